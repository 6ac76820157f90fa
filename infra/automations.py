"""Give the Prefect server the automations of infra/automations.yaml.

    ADAPTERLINE_WEBHOOK_URL=https://… python -m infra.automations     all of them
    python -m infra.automations --without-webhook                     those that notify nobody

The URL is kept by the server in a Webhook block; afterwards it need not be given again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import yaml

from infra import environment
from infra.errors import StackError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

FILE = Path(__file__).with_suffix(".yaml")
VARIABLE = "ADAPTERLINE_WEBHOOK_URL"
BLOCK_TYPE, BLOCK = "webhook", "adapterline-webhook"


def load(path: Path = FILE) -> list[dict[str, Any]]:
    """The automations as written. Raises StackError when the file is not a list of them."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise StackError(f"expected automations in {path}; found {type(error).__name__}; correct it") from error
    if not isinstance(content, list) or not all(isinstance(each, dict) and "name" in each for each in content):
        raise StackError(f"expected a list of automations in {path}; found something else; correct it")
    return content


def apply(client: SyncPrefectClient, automations: list[dict[str, Any]], webhook: UUID | None) -> list[str]:
    """Make or update each, by name. Without a webhook, those that need one are left out. The names of the others."""
    from prefect.events.schemas.automations import AutomationCore

    applied = []
    for content in automations:
        if webhook is None and any("block" in action for action in content["actions"]):
            continue
        automation = AutomationCore.model_validate(_filled(content, webhook))
        standing = client.read_automations_by_name(automation.name)
        if standing:
            automation.enabled = standing[0].enabled
            client.update_automation(standing[0].id, automation)
        else:
            client.create_automation(automation)
        applied.append(automation.name)
    return applied


def webhook(client: SyncPrefectClient, url: str | None) -> UUID:
    """Id of the block that holds the URL. Raises StackError when there is none, or it is no URL."""
    from prefect.blocks.webhook import Webhook
    from prefect.exceptions import ObjectNotFound

    if url is None:
        try:
            return client.read_block_document_by_name(BLOCK, BLOCK_TYPE).id
        except ObjectNotFound:
            todo = "set it to the URL that takes notifications, or pass --without-webhook"
            raise StackError(f"expected {VARIABLE}; found it unset; {todo}") from None
    if not url.startswith(("https://", "http://")):
        raise StackError(f"expected {VARIABLE} to begin with https:// or http://; found something else; correct it")
    block = Webhook.model_validate({"url": url, "headers": {"Content-Type": "application/json"}})
    saved: Any = block.save(BLOCK, overwrite=True)
    return UUID(str(saved))


def _filled(content: dict[str, Any], webhook: UUID | None) -> dict[str, Any]:
    """With the id of the block in place of its name."""
    actions = []
    for action in content["actions"]:
        rest = {key: value for key, value in action.items() if key != "block"}
        actions.append({**rest, "block_document_id": str(webhook)} if "block" in action else rest)
    return {**content, "actions": actions}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m infra.automations", description="Give the Prefect server the automations."
    )
    parser.add_argument("--without-webhook", action="store_true", help="leave out those that notify")
    options = parser.parse_args(arguments)
    environment.adopt(os.environ)
    try:
        _report(options.without_webhook)
    except StackError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _report(without_webhook: bool) -> None:
    """Apply them and say which. Raises StackError when there is no server, or it does not answer."""
    import httpx
    from prefect import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import get_current_settings

    if get_current_settings().api.url is None:
        raise StackError("expected a Prefect server; found PREFECT_API_URL unset; run `make up`, or set it")
    try:
        with get_client(sync_client=True) as client:
            block = None if without_webhook else webhook(client, os.environ.get(VARIABLE) or None)
            for name in apply(client, load(), block):
                sys.stdout.write(f"applied: {name}\n")
    except (httpx.TransportError, PrefectHTTPStatusError) as error:
        found = type(error).__name__
        raise StackError(f"expected the Prefect server to answer; found {found}; look at its log") from error


if __name__ == "__main__":
    sys.exit(main())
