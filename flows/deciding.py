"""The command line of promotion. It asks no Prefect server, so that a way back takes seconds."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from components.config import RegistryConfig
from flows import command, review
from infra import local

if TYPE_CHECKING:
    from components.registry.promotion import Registry

ACTIONS = ("promote", "rollback", "history")


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    # `flows.promote MODEL` is short for `flows.promote promote MODEL`.
    if given and given[0] not in (*ACTIONS, "-h", "--help"):
        given = ["promote", *given]
    options = _parser().parse_args(given)
    command.listen(options.debug)
    local.interrupt_on_sigterm()
    with command.one_line_errors(options.debug, "interrupted: the next command finishes or undoes it") as ending:
        from components.registry import promotion

        with command.servers():
            registry = promotion.connect(RegistryConfig(store=options.store))
            {"promote": _promote, "rollback": _roll_back, "history": _history}[options.action](registry, options)
    return ending.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.promote",
        description="Promote a version to production, roll back, or read the history.",
        epilog="exit code: 0 done, 2 the gate says no, 3 the test rows cannot tell, 1 an error (nothing was changed)",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    promote = actions.add_parser("promote", help="put a version into production (`promote` may be left out)")
    promote.add_argument("--version", help="its number; the candidate if left out")
    promote.add_argument("--yes", action="store_true", help="do it; without, the evidence is shown and nothing changed")
    promote.add_argument("--comment", default="approved on the command line", help="why, for the history")
    back = actions.add_parser("rollback", help="put an earlier version back")
    back.add_argument("--to", metavar="VERSION", help="its number; the one before if left out")
    back.add_argument("--reason", required=True, help="why, for the history")
    history = actions.add_parser("history", help="when, from, to, who, why")
    for each in (promote, back, history):
        each.add_argument("model", help="name of the registered model")
        each.add_argument(
            "--store", default=RegistryConfig().store, help="where the history lies (default: %(default)s)"
        )
        each.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    promote.add_argument("--reviewer", default="", help="who decides")
    back.add_argument("--reviewer", required=True, help="who decides")
    return parser


def _promote(registry: Registry, options: argparse.Namespace) -> None:
    from components.registry import promotion

    if options.yes:
        approval = promotion.Approval(options.reviewer, options.comment)
    case = promotion.examine(registry, options.model, options.version)
    print(review.case(case))
    if not options.yes:
        print("\nnothing was changed: add --yes --reviewer NAME to promote it")
        return
    print(f"\n{review.moved(promotion.promote(registry, case, approval))}")


def _roll_back(registry: Registry, options: argparse.Namespace) -> None:
    from components.registry import promotion

    approval = promotion.Approval(options.reviewer, options.reason)
    print(review.moved(promotion.roll_back(registry, options.model, approval, options.to)))


def _history(registry: Registry, options: argparse.Namespace) -> None:
    from components.registry import promotion

    records, by_hand = promotion.look(registry, options.model)
    if not records and not by_hand:
        print(f"nothing was ever in production of {options.model}")
        return
    print(review.history(records, by_hand))


if __name__ == "__main__":
    sys.exit(main())
