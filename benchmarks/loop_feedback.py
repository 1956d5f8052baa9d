"""From corrections to a version that answers, on the embedded model: how long it takes, and what it knows then.

    python benchmarks/loop_feedback.py                 # 20 corrections; a few minutes on two cores
    python benchmarks/loop_feedback.py --smoke         # 4 corrections and a short lesson, to see that it runs

A scripted user asks the handbook's questions over HTTP and corrects each answer; the runner makes a dataset, trains, asks the gate, and
tries the version on a share of the users, who give thumbs; then a planted bad version has to be stopped, and a rollback is timed. It is
what `everlearn demo` plays. `learned` is the time from the last correction to the champion that has learned it, canary included.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import msgspec
import tinker
from common import arguments, server, short, write_result

from everlearn.cli.client import Client
from everlearn.demo import handbook, story


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(model="smollm2")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of the lesson")
    parser.add_argument("--paraphrases", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rehearsed", type=int, default=12, help="general examples in every batch")
    args = parser.parse_args()
    logging.getLogger("tinker").setLevel(logging.ERROR)
    book = handbook.load()
    update = {"paraphrases": args.paraphrases, "epochs": args.epochs, "rehearsed": args.rehearsed, "seed": args.seed}
    if args.smoke:
        book = msgspec.structs.replace(book, facts=book.facts[:4], general=book.general[:4])
        update |= {"paraphrases": 1, "epochs": 8, "batch": 4, "rehearsed": 4}
    with server(args) as live, tinker.ServiceClient(base_url=live.url, api_key="tml-benchmark") as service:
        client = Client(live.url, timeout=600.0)
        told = story.play(book, client, service, live.model, update, lambda line: print(line, flush=True))
        client.close()
    sections = {score.section: {"asked": score.asked, "before": score.before, "after": score.after} for score in told.scores}
    shown = {
        name: getattr(told, name) for name in ("corrections", "trained", "held_out", "seconds", "learned", "stopped", "rollback_seconds")
    }
    events = [
        {name: event[name] for name in ("kind", "state", "champion", "candidate", "share", "reason", "created_at")} for event in told.events
    ]
    results = {"model": short(args.model), "update": update, **shown, "sections": sections, "events": events}
    print(msgspec.json.format(msgspec.json.encode({**shown, "sections": sections})).decode())
    write_result(args, "loop-feedback" + ("-smoke" if args.smoke else f"-{args.seed}" if args.seed else ""), results)


if __name__ == "__main__":
    main()
