"""The calls a batch takes (upload, create, look, fetch), each repeated until the server can be given up."""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from openai.types import Batch, FileObject

from gadfly.api.batch_rows import ENDPOINT
from gadfly.api.chat_answer import RequestFailed
from gadfly.api.chat_api import ChatApi, wait_seconds
from gadfly.run_folder import Record

logger = logging.getLogger(__name__)

# The field of a batch's metadata that tells which submission it is.
_NAME_FIELD = "gadfly"
# By how much the provider's clock may be slow.
_CLOCK_SECONDS = 3600.0
# A file cut at the end of a row looks whole, and what it lacks would be paid for again.
_FETCHES = 3

T = TypeVar("T")


class BatchCalls:
    """One API's files and batches."""

    def __init__(self, api: ChatApi, label: str):
        """Log under `label` what has to be repeated."""
        self._api, self._label = api, label
        self._was_heard = False

    async def upload(self, name: str, content: bytes) -> str:
        """Upload the requests of a batch, and return the file's id.

        Raises:
            ApiError: the server turns it down, or has failed for too long; so do all calls.
        """
        files = self._api.client.files
        missing = "no files for batches there; teacher.batch = false asks without them"

        async def send() -> FileObject:
            return await files.create(file=(f"{name}.jsonl", content), purpose="batch")

        return (await self._repeat("uploading a batch", send, FileObject, missing)).id

    async def create(self, name: str, file_id: str, noted_at: float) -> str:
        """Create a batch, and return its id; looked for before it is created again if the reply is lost."""
        batches = self._api.client.batches
        missing = "no batches there; teacher.batch = false asks without them"
        may_be_there = False

        async def send() -> Batch:
            nonlocal may_be_there
            if may_be_there and (found := await self._search(name, file_id, noted_at)):
                return found
            may_be_there = True
            return await batches.create(
                input_file_id=file_id,
                endpoint=ENDPOINT,
                completion_window="24h",
                metadata={_NAME_FIELD: name},
            )

        return (await self._repeat("creating a batch", send, Batch, missing)).id

    async def find(self, name: str, file_id: str, noted_at: float) -> str | None:
        """The id of the batch that was created as `name`, or of the uploaded file; None if none was."""
        missing = "batches cannot be listed there; delete collect/batches.json to submit again"

        async def send() -> list[Batch]:
            found = await self._search(name, file_id, noted_at)
            return [found] if found else []

        found = await self._repeat("looking for a batch", send, list, missing)
        return found[0].id if found else None

    async def look(self, batch_id: str) -> Batch:
        """How a batch fares."""
        missing = f"no {batch_id} there; if it is gone, delete collect/batches.json to ask again"
        batches = self._api.client.batches
        return await self._repeat(
            f"waiting for {batch_id}", lambda: batches.retrieve(batch_id), Batch, missing
        )

    async def fetch(self, file_id: str | None, num_rows: int) -> list[Record]:
        """The rows of a file, none of no file; fetched again where it holds fewer than the batch says."""
        if file_id is None:
            return []
        missing = f"no {file_id} there; if it is gone, delete collect/batches.json to ask again"

        async def send() -> list[Record]:
            content = (await self._api.client.files.content(file_id)).content
            # Only \n ends a row: an answer may hold any other line separator.
            rows = [json.loads(line) for line in content.split(b"\n") if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("a row of the file is no object")
            return rows

        for _ in range(_FETCHES):
            rows = await self._repeat(f"fetching {file_id}", send, list, missing)
            if len(rows) >= num_rows:
                break
        return rows

    async def _search(self, name: str, file_id: str, noted_at: float) -> Batch | None:
        async for batch in self._api.client.batches.list(limit=100):
            if (batch.metadata or {}).get(_NAME_FIELD) == name or batch.input_file_id == file_id:
                return batch
            if (batch.created_at or noted_at) < noted_at - _CLOCK_SECONDS:
                return None
        return None

    async def _repeat(
        self, what: str, send: Callable[[], Awaitable[T]], kind: type[object], not_found: str
    ) -> T:
        api, began, failures = self._api, time.monotonic(), 0
        api.heard_at = began
        while True:
            try:
                with api.explain_failures(not_found):
                    answer = await send()
                if not isinstance(answer, kind):
                    raise RequestFailed("no-json", api.safe_line(f"the server sent {str(answer)[:80]!r}"))
                api.heard_at, self._was_heard = time.monotonic(), True
                return answer
            except RequestFailed as failure:
                waited = time.monotonic() - began
                failures += failure.kind != "rate-limit"
                # A server that never answered is more likely a wrong address than one that will be back.
                is_hopeless = not self._was_heard and failures >= api.config.max_attempts
                if failure.kind == "rejected":
                    raise api.fatal(f"{what}: {failure.detail}") from None
                if is_hopeless or waited > api.config.give_up_seconds:
                    raise api.fatal(f"{what}: given up after {waited:.0f} s: {failure}") from None
                api.errors[failure.kind] += 1
                logger.info("%s  %s  %s", self._label, what, failure, extra={"live": True})
            await asyncio.sleep(max(api.limits.paused_seconds, wait_seconds(failures) if failures else 0.0))
