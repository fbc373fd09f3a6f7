"""`glmv-data recaption`: captions rewritten by a served model, originals and recaptions merged at a ratio.

Which samples get a new caption is a function of seed and key. Answers are kept by sample key as they come, so a run that is
killed pays for none twice. A server that does not answer stops the job, which continues later; a sample that it refuses is
dropped with its reason.

Source: GLM-4.1V-Thinking (arXiv 2507.01006v6) section 3.1: a recaptioner that takes noise out and keeps the facts, merged at a
fixed ratio (not in the paper). OpenAI API reference, chat completions.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageOps

from data_tools.corpus import arguments
from data_tools.corpus.checks import Loaded, Medium
from data_tools.corpus.faults import Fault
from data_tools.corpus.formats import check_text
from data_tools.corpus.job import JobStopped, chunk_path
from data_tools.corpus.pipeline import Context
from data_tools.corpus.reader import CorpusError
from megatron_glmv.data.sample import Item, Message

PROMPT = (
    "Here are a picture and the text that was found with it. Write one fluent caption of the picture. Keep every name, number "
    "and fact of the text that fits the picture, and leave out what does not.\n\nText: {caption}"
)
SENT_BYTES = 4 << 20
SENT_SIDE = 2048
"""A larger picture, or one of a kind that servers do not take, is sent upright as a JPEG with this longer side."""
WEB = {"jpg": "jpeg", "png": "png", "webp": "webp"}
LONGEST_WAIT_S = 60.0


@dataclass(frozen=True)
class Answer:
    """A caption, with the tokens it took."""

    caption: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Endpoint:
    """A served model.

    Attributes:
        url: up to and with `/v1`.
        model: its name there.
        key: bearer token; empty for none.
        max_tokens: of an answer.
        temperature: of sampling.
        retries: after the first try, for no connection, 429 and 5xx.
        backoff_s: before the first retry; doubles.
        timeout_s: of one request.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    max_tokens: int = 512
    temperature: float = 0.0
    retries: int = 6
    backoff_s: float = 1.0
    timeout_s: float = 120.0

    def ask(self, client: httpx.Client, content: list[dict[str, Any]]) -> Answer:
        """One question.

        Raises:
            Fault: the server refuses it, or the answer has no text.
            JobStopped: the server cannot be reached or fails, every time.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": content}],
                "max_tokens": self.max_tokens, "temperature": self.temperature}  # fmt: skip
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        problem = ""
        for attempt in range(self.retries + 1):
            pause = self.backoff_s * 2**attempt
            try:
                response = client.post(f"{self.url.rstrip('/')}/chat/completions", json=body, headers=headers)
            except httpx.TransportError as error:
                problem = str(error) or type(error).__name__
            else:
                if response.status_code == 200:
                    return _read_answer(response)
                problem = f"HTTP status {response.status_code}"
                if response.status_code in (401, 403, 404):
                    raise JobStopped(f"{self.url}: {problem}; check --url, --model and the key")
                if response.status_code < 500 and response.status_code not in (408, 429):
                    raise Fault("caption_refused", f"{problem} {response.text[:100]}")
                pause = max(pause, _retry_after(response))
            if attempt < self.retries:
                time.sleep(min(pause, LONGEST_WAIT_S))
        raise JobStopped(f"{self.url}: no answer after {self.retries + 1} tries ({problem}); the same command continues later")


@dataclass(frozen=True)
class Recaption:
    """The tool.

    Attributes:
        endpoint: of the captioner.
        ratio: share of captions that are rewritten.
        prompt: with {caption} where the original goes.
        concurrency: requests at once in each process.
        seed: of the choice.
        price_in: of a million prompt tokens, for the report.
        price_out: of a million answered tokens.
    """

    endpoint: Endpoint
    ratio: float = 0.5
    prompt: str = PROMPT
    concurrency: int = 16
    seed: int = 0
    price_in: float = 0.0
    price_out: float = 0.0
    name: str = "recaption"

    def settings(self) -> dict[str, Any]:
        """What captions depend on; not the address, so that a server may move."""
        endpoint = self.endpoint
        return {"model": endpoint.model, "max_tokens": endpoint.max_tokens, "temperature": endpoint.temperature,
                "ratio": self.ratio, "prompt": self.prompt, "seed": self.seed}  # fmt: skip

    def apply(self, samples: Iterator[Loaded], context: Context) -> Iterator[Loaded | tuple[Loaded, Any]]:
        """Samples with their own or a new caption, in order, while up to twice `concurrency` wait for answers."""
        answers = _Answers(context.scratch / f"recaption-{context.number:06d}.jsonl")
        used: list[Answer] = []
        waiting: deque[tuple[Loaded, Future[Answer] | None]] = deque()
        with httpx.Client(timeout=self.endpoint.timeout_s) as client, ThreadPoolExecutor(self.concurrency) as pool:
            try:
                for loaded in samples:
                    future = pool.submit(self._caption, client, answers, loaded) if self._is_chosen(loaded) else None
                    waiting.append((loaded, future))
                    if len(waiting) > 2 * self.concurrency:
                        yield self._take(*waiting.popleft(), used)
                while waiting:
                    yield self._take(*waiting.popleft(), used)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        tokens = [sum(answer.prompt_tokens for answer in used), sum(answer.completion_tokens for answer in used)]
        usage = {"recaptions": len(used), "prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
        chunk_path(context.folder, context.number, "usage.json").write_text(json.dumps(usage), encoding="utf-8")

    def finish(self, numbers: Sequence[int], passes: Path, folder: Path) -> dict[str, Any]:
        """The meter: tokens and their price."""
        total = {"recaptions": 0, "prompt_tokens": 0, "completion_tokens": 0}
        for number in numbers:
            usage = json.loads(chunk_path(passes / "write", number, "usage.json").read_text(encoding="utf-8"))
            total = {name: total[name] + usage[name] for name in total}
        cost = (total["prompt_tokens"] * self.price_in + total["completion_tokens"] * self.price_out) / 1e6
        return total | ({"cost": round(cost, 4)} if self.price_in or self.price_out else {})

    def _is_chosen(self, loaded: Loaded) -> bool:
        """Only a picture or video with a caption: one question, one answer."""
        roles = [message.role for message in loaded.record.sample.messages if message.role != "system"]
        if roles != ["user", "assistant"] or not loaded.media:
            return False
        text = json.dumps([self.seed, loaded.record.sample.key])
        value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64
        return value < self.ratio

    def _caption(self, client: httpx.Client, answers: _Answers, loaded: Loaded) -> Answer:
        key = loaded.record.sample.key
        known = answers.get(key)
        if known is not None:
            return known
        content = [{"type": "image_url", "image_url": {"url": url}} for medium in loaded.media for url in data_uris(medium)]
        prompt = self.prompt.replace("{caption}", _caption_of(loaded))
        answer = self.endpoint.ask(client, [*content, {"type": "text", "text": prompt}])
        answers.add(key, answer)
        return answer

    def _take(self, loaded: Loaded, future: Future[Answer] | None, used: list[Answer]) -> Loaded | tuple[Loaded, Any]:
        if future is None:
            return loaded
        record = loaded.record
        try:
            answer = future.result()
        except Fault as fault:
            return loaded, fault.dropped(record.source, record.sample.key)
        used.append(answer)
        *before, _ = record.sample.messages
        messages = (*before, Message("assistant", (Item("text", answer.caption),)))
        extra = record.extra | {"original_caption": _caption_of(loaded), "captioned_by": self.endpoint.model}
        return replace(loaded, record=replace(record, sample=replace(record.sample, messages=messages), extra=extra))


class _Answers:
    """Answers of a chunk by sample key, on disk as soon as they come."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._known: dict[str, Answer] = {}
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]  # a killed run may have left half a line
        if len(whole) < len(data):
            path.write_bytes(whole)
        for line in whole.splitlines():
            key, caption, *tokens = json.loads(line)
            self._known[key] = Answer(caption, *tokens)

    def get(self, key: str) -> Answer | None:
        """The answer that an earlier start paid for, or None."""
        return self._known.get(key)

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer; several threads may call it at once."""
        line = json.dumps([key, answer.caption, answer.prompt_tokens, answer.completion_tokens]) + "\n"
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(line)


def data_uris(medium: Medium) -> list[str]:
    """A picture as a data: URI, a video as those of its frames; what is sent untouched keeps its EXIF data."""
    if medium.kind == "video":
        return [_jpeg_uri(frame) for frame in medium.previews]
    if medium.extension in WEB and len(medium.data) <= SENT_BYTES:
        return [f"data:image/{WEB[medium.extension]};base64,{base64.b64encode(medium.data).decode()}"]
    with Image.open(io.BytesIO(medium.data)) as picture:
        upright = ImageOps.exif_transpose(picture)  # the JPEG carries no EXIF
        upright.thumbnail((SENT_SIDE, SENT_SIDE))
        return [_jpeg_uri(upright)]


def _jpeg_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _caption_of(loaded: Loaded) -> str:
    return "".join(item.value for item in loaded.record.sample.messages[-1].content)


def _read_answer(response: httpx.Response) -> Answer:
    try:
        tree = response.json()
        choice, usage = tree["choices"][0], tree.get("usage") or {}
        text = choice["message"]["content"]
        check_text(text)
        tokens = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise Fault("caption_empty", f"the answer is no chat completion ({error})") from None
    if choice.get("finish_reason") == "length":
        raise Fault("caption_empty", "cut at the limit of tokens")
    text = text.rpartition("</think>")[2].replace("<answer>", "").replace("</answer>", "").strip()
    if not text:
        raise Fault("caption_empty", "no text")
    return Answer(text, *tokens)


def _retry_after(response: httpx.Response) -> float:
    try:
        return float(response.headers.get("retry-after", 0))
    except ValueError:
        return 0.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `glmv-data recaption`."""
    parser.description = (
        "Has a served model (an OpenAI-compatible endpoint) rewrite the captions of a share of the samples. A rewritten\n"
        f"sample keeps the old caption as original_caption.\n{arguments.HELP}"
    )
    arguments.add_arguments(parser)
    group = parser.add_argument_group("captioner")
    group.add_argument("--url", required=True, help="of the endpoint, with /v1")
    group.add_argument("--model", required=True, help="its name there")
    group.add_argument("--key-env", metavar="NAME", help="environment variable with the key (default: no key)")
    group.add_argument("--ratio", type=float, default=0.5, help="share of captions to rewrite (default %(default)s)")
    group.add_argument("--prompt", type=Path, metavar="FILE", help="instruction with {caption} (default: see the source)")
    group.add_argument("--concurrency", type=int, default=16, help="requests at once a process (default %(default)s)")
    group.add_argument("--max-tokens", type=int, default=512, help="of a caption (default %(default)s)")
    group.add_argument("--temperature", type=float, default=0.0, help="(default %(default)s)")
    group.add_argument("--retries", type=int, default=6, help="of a request (default %(default)s)")
    group.add_argument("--backoff", type=float, default=1.0, metavar="SECONDS", help="before the first retry; doubles")
    group.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="of a request (default %(default)s)")
    group.add_argument("--price-in", type=float, default=0.0, help="of a million prompt tokens, for the report")
    group.add_argument("--price-out", type=float, default=0.0, help="of a million answered tokens")
    group.add_argument("--seed", type=int, default=0, help="of the choice (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Run the tool and print its report.

    Raises:
        CorpusError: a number out of its range, a prompt without {caption}, or no key where one is named.
    """
    if not 0 <= args.ratio <= 1 or args.concurrency < 1 or args.retries < 0 or args.max_tokens < 1:
        raise CorpusError("--ratio from 0 to 1, --concurrency and --max-tokens at least 1, --retries at least 0")
    prompt = PROMPT if args.prompt is None else args.prompt.read_text(encoding="utf-8")
    if "{caption}" not in prompt:
        raise CorpusError(f"{args.prompt}: no {{caption}} where the original goes")
    key = os.environ.get(args.key_env, "") if args.key_env else ""
    if args.key_env and not key:
        raise CorpusError(f"--key-env {args.key_env}: the variable is not set")
    endpoint = Endpoint(args.url, args.model, key, args.max_tokens, args.temperature, args.retries, args.backoff, args.timeout)
    args.workers = args.workers or 1
    tool = Recaption(endpoint, args.ratio, prompt, args.concurrency, args.seed, args.price_in, args.price_out)
    arguments.run_over_corpus(args, tool)
