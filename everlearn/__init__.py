"""everlearn: one self-hosted program that turns a static open model into an agent that keeps learning."""

__version__ = "0.1.0"
