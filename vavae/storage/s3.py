"""S3 with our own retries: one rule for every request, and a broken body resumes at the byte where it broke."""

import asyncio
import os
from typing import Any

from s3fs import S3FileSystem

from vavae.storage.config import StorageOptions
from vavae.storage.retry import COUNTERS, Attempts, Retry

_CHUNK_BYTES = 1 << 18
_DELETED_AT_ONCE = 32


class RetryingS3(S3FileSystem):
    """The S3 file system of s3fs, whose own retries (of other errors, with other pauses) and botocore's are off."""

    retries = 1  # read by s3fs: attempts at one request

    def __init__(self, options: StorageOptions, **others: Any) -> None:
        self._retry = Retry.of(options)
        session = {"profile": options.profile} if options.profile else {}
        client = {"region_name": options.region, "verify": options.ca_bundle}
        super().__init__(
            anon=options.anonymous,
            endpoint_url=options.endpoint,
            client_kwargs={name: value for name, value in client.items() if value is not None},
            config_kwargs={
                "connect_timeout": options.connect_seconds,
                "read_timeout": options.read_seconds,
                "retries": {"total_max_attempts": 1, "mode": "standard"},
                # Many servers understand no checksum behind the body; its signature or TLS guards it all the same.
                "request_checksum_calculation": "when_required",
            },
            max_concurrency=options.connections,
            **session,
            **others,
        )

    @property
    def endpoint(self) -> str | None:
        """Address of the server, for messages; None as long as it can't be told."""
        client = getattr(self, "_s3", None)
        return self.endpoint_url if client is None else client.meta.endpoint_url

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "complete_multipart_upload":
            # An attempt that failed may have worked, and the next one would find no upload: all parts are put again.
            return await self._ask(method, *args, **kwargs)
        async for attempt in self._attempts(kwargs):
            with attempt:
                result = await self._ask(method, *args, **kwargs)
        return result

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        bucket, key, _ = self.split_path(path)
        body = _Body(self, self._attempts({"Bucket": bucket, "Key": key}), bucket, key, start or 0, end)
        return await body.read()

    async def _rm(self, path: str, recursive: bool = False, **kwargs: Any) -> None:
        # Key by key: the request for many needs a digest that older servers ask for and newer clients don't send, and
        # s3fs passes over the failures that its answer lists.
        keys = await self._find(path)
        for first in range(0, len(keys), _DELETED_AT_ONCE):
            await asyncio.gather(*(self._rm_file(key) for key in keys[first : first + _DELETED_AT_ONCE]))

    async def _ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        COUNTERS.add(requests=1)
        return await super()._call_s3(method, *args, **kwargs)

    def _attempts(self, named: dict[str, Any]) -> Attempts:
        return self._retry.attempts(f"s3://{named.get('Bucket', '')}/{named.get('Key', named.get('Prefix', ''))}")


class _Body:
    """The bytes of an object from ``start`` up to ``end`` or its end, all of one version of it."""

    def __init__(self, s3: RetryingS3, attempts: Attempts, bucket: str, key: str, start: int, end: int | None) -> None:
        assert 0 <= start < (start + 1 if end is None else end), f"no bytes from {start} to {end}"
        self._s3, self._attempts, self._object = s3, attempts, {"Bucket": bucket, "Key": key}
        self._start, self._end = start, end
        self._version: dict[str, str] = {}
        self._data = bytearray()

    async def read(self) -> bytes:
        async for attempt in self._attempts:
            with attempt:
                await self._continue()
        return bytes(self._data)

    async def _continue(self) -> None:
        offset = self._start + len(self._data)
        wanted = {} if offset == 0 and self._end is None else {"Range": f"bytes={offset}-{_last(self._end)}"}
        answer = await self._s3._ask("get_object", **self._object, **wanted, **self._version)
        body = answer["Body"]
        try:
            if not self._version:
                self._version = {"IfMatch": answer["ETag"]}
                total = answer["ContentLength"]
                if wanted:
                    total = int(answer["ContentRange"].rpartition("/")[2])
                self._end = total if self._end is None else min(total, self._end)
            assert self._end is not None
            while self._start + len(self._data) < self._end:
                chunk = await body.read(_CHUNK_BYTES)
                if not chunk:
                    raise ConnectionError(f"the body ended at byte {self._start + len(self._data)} of {self._end}")
                self._data += chunk
                self._attempts.progressed()
        finally:
            body.close()
        assert self._start + len(self._data) == self._end, "the server sent more than was asked for"


def _last(end: int | None) -> str:
    return "" if end is None else str(end - 1)


# A forked process keeps what it inherits: closing it would take the parent's sockets out of the poll that both share.
# A reference is taken before the fork, because fsspec drops its own right after.
_INHERITED: list[Any] = []
os.register_at_fork(before=lambda: _INHERITED.append(dict(RetryingS3._cache)), after_in_parent=_INHERITED.pop)
