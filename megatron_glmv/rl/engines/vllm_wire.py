"""What a vLLM server is sent and what it answers, as plain trees; nothing here asks anything.

The server expands placeholders itself: from ids whose placeholders are expanded already it makes more of them, says nothing,
and samples from another prompt. So runs are collapsed before they are sent, and the ids that the server then read are compared.

Source: vLLM 0.32.0, entrypoints/scale_out/token_in_token_out/protocol.py (`GenerateRequest`, `GenerateTokensChoice`),
model_executor/models/glm4_1v.py (one `<|image|>` for a picture; begin, `<|video|>`, end for a video), multimodal/media/image.py
(transparency is laid over white, where this project's decoder drops it).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageOps

from megatron_glmv.config.model import ModelShape
from megatron_glmv.rl.engines.engine import Sampling
from megatron_glmv.rl.types import Finish, MediaFile, Prompt

GENERATE = "/inference/v1/generate"
LogprobKind = Literal["processed", "raw", "logits"]
NO_LOGPROB = -9999.0
"""What the server writes where it has no log-probability, or one that is no number."""
_TYPES = {"jpg": "jpeg", "mkv": "x-matroska", "mov": "quicktime", "avi": "x-msvideo"}


class RequestFailed(Exception):
    """A request that cannot be answered, whatever the server; the answers that it asked for are left out."""


@dataclass(frozen=True)
class Piece:
    """What the server sampled of one answer.

    Attributes:
        tokens: ids, a stop token included.
        logprobs: one for each.
        finish: why it ended here.
        versions: of the weights that sampled it.
    """

    tokens: list[int]
    logprobs: list[float]
    finish: Finish
    versions: frozenset[str]


def collapse(prompt: Prompt, shape: ModelShape) -> list[int]:
    """The prompt's ids with one placeholder for each picture and video.

    Raises:
        RequestFailed: the files are not there, or are not those of the placeholders.
    """
    tokens, special, merge = prompt.tokens, shape.tokens, shape.vision.spatial_merge_size
    if prompt.frames and not prompt.files:
        raise RequestFailed("the prompt has pictures and not their files, which a vLLM server needs")
    places = np.flatnonzero(tokens == special.image)
    sizes = [rows * columns // merge**2 for rows, columns in prompt.frames]
    if len(places) != sum(sizes) or sum(file.num_frames for file in prompt.files) != len(sizes):
        raise RequestFailed(
            f"{len(places)} placeholders, {len(sizes)} frames of {sum(sizes)} tokens and {len(prompt.files)} files do not match"
        )
    collapsed: list[int] = []
    start = frame = seen = 0
    for file in prompt.files:
        count = sum(sizes[frame : frame + file.num_frames])
        first, last = int(places[seen]), int(places[seen + count - 1])
        if file.kind == "image":
            if last - first + 1 != count:
                raise RequestFailed("the placeholders of a picture do not stand together")
            inside, before, end = [special.image], first, last + 1
        else:
            inside = [special.video_start, special.video, special.video_end]
            before = _find(tokens, special.video_start, start, first)
            end = _find(tokens, special.video_end, last, len(tokens)) + 1
        collapsed += [*tokens[start:before].tolist(), *inside]
        start, frame, seen = end, frame + file.num_frames, seen + count
    return collapsed + tokens[start:].tolist()


def _find(tokens: np.ndarray, token: int, start: int, stop: int) -> int:
    """Place of the only `token` in a part of the prompt."""
    found = np.flatnonzero(tokens[start:stop] == token)
    if not len(found):
        raise RequestFailed(f"no token {token} around the frames of a video")
    return start + int(found[0])


def upload(file: MediaFile) -> dict[str, str]:
    """A picture or video as the server takes it: its bytes, written out."""
    data, extension = file.data, file.extension.lower()
    if file.kind == "image":
        data, extension = _opaque(data, extension)
    kind = f"{file.kind}/{_TYPES.get(extension, extension)}"
    return {"type": f"{file.kind}_url", "url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}


def _opaque(data: bytes, extension: str) -> tuple[bytes, str]:
    """A picture with transparency as one without, its colours kept, since the server would blend them with white."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if not image.has_transparency_data:
                return data, extension
            opaque = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return data, extension  # the server says what is wrong with it
    buffer = io.BytesIO()
    opaque.save(buffer, "PNG")
    return buffer.getvalue(), "png"


def request_body(
    model: str,
    tokens: Sequence[int],
    parts: Sequence[Mapping[str, str]],
    sampling: Sampling,
    *,
    count: int,
    seed: int,
    max_tokens: int,
) -> dict[str, Any]:
    """A request for answers. Every field of the sampling is sent: what is left out may come from the checkpoint's defaults.

    Args:
        model: name under which the policy is served.
        tokens: collapsed prompt, and what has been written of the answer.
        parts: pictures and videos, in token order.
        sampling: temperature, nucleus, stop tokens.
        count: answers.
        seed: of the first answer; the server gives the following ones the following numbers.
        max_tokens: of each answer.
    """
    params = {
        "n": count,
        "seed": seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_tokens": 0,
        "max_tokens": max_tokens,
        "stop_token_ids": list(sampling.stop_tokens),
        "ignore_eos": True,  # the stop tokens alone end an answer, not those of the server's folder
        "logprobs": 0,
        "detokenize": False,
    }
    media = {"content_parts": list(parts)} if parts else {}
    return {"model": model, "token_ids": list(tokens), "sampling_params": params, "return_token_ids": True, **media}


def read_pieces(reply: Any, expanded: Sequence[int], count: int, max_tokens: int, stops: Sequence[int]) -> list[Piece]:
    """The pieces of a reply, in the order of their seeds.

    Args:
        reply: JSON of the server.
        expanded: the trainer's own ids of what was sent.
        count: answers that were asked for.
        max_tokens: of each.
        stops: stop tokens.

    Raises:
        ValueError: the reply has another form than it should have; another try may help.
        RequestFailed: it contradicts what was asked for.
    """
    read = reply["prompt_token_ids"]
    if read != list(expanded):
        raise RequestFailed(_difference(read, expanded))
    choices = sorted(reply["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(count)):
        raise ValueError(f"{len(choices)} answers instead of {count}")
    return [_read_piece(choice, max_tokens, stops) for choice in choices]


def _read_piece(choice: Mapping[str, Any], max_tokens: int, stops: Sequence[int]) -> Piece:
    tokens = [int(token) for token in choice["token_ids"] or ()]
    content = (choice["logprobs"] or {}).get("content") or ()
    if len(content) != len(tokens) or any(entry["token_id"] != token for entry, token in zip(content, tokens, strict=True)):
        raise RequestFailed(f"{len(tokens)} tokens came with {len(content)} log-probabilities, or with those of other tokens")
    logprobs = [float(entry["logprob"]) for entry in content]
    if any(not math.isfinite(logprob) or logprob <= NO_LOGPROB for logprob in logprobs):
        raise RequestFailed("a token came without a log-probability; are the weights finite?")
    finish: Finish = choice["finish_reason"]
    if finish not in get_args(Finish):
        raise ValueError(f"an answer ended with {finish!r}")
    if len(tokens) > max_tokens:
        raise RequestFailed(f"an answer of {len(tokens)} tokens where {max_tokens} were allowed")
    if finish == "stop" and tokens[-1] not in stops:
        raise RequestFailed(f"an answer stopped at token {tokens[-1]}, which is none of its stop tokens")
    spans = choice["weight_versions"] or ()
    return Piece(tokens, logprobs, finish, frozenset(str(span["version"]) for span in spans))


def _difference(read: Sequence[int], expanded: Sequence[int]) -> str:
    pairs = enumerate(zip(read, expanded, strict=False))
    place = next((place for place, (theirs, own) in pairs if theirs != own), min(len(read), len(expanded)))
    return (
        f"the server reads {len(read)} tokens where {len(expanded)} were meant, other ones from place {place} on; its folder "
        "needs the run's own tokenizer and limits of pictures and videos"
    )


def probe_body(model: str, token: int, temperature: float) -> dict[str, Any]:
    """A request for the likeliest next tokens after one token, to see of which temperature the log-probabilities are."""
    params = {"temperature": temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "max_tokens": 1, "seed": 0, "logprobs": 8}
    return {"model": model, "token_ids": [token], "sampling_params": params | {"ignore_eos": True, "detokenize": False}}


def read_probe(reply: Any) -> dict[int, float]:
    """Token -> log-probability of a probe's reply."""
    return {
        entry["token_id"]: float(entry["logprob"]) for entry in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    }


def judge_probe(plain: Mapping[int, float], cold: Mapping[int, float], temperature: float) -> LogprobKind:
    """Of what kind log-probabilities are: of the temperature, of temperature 1, or none.

    Two tokens' distance grows by 1 / temperature where it is applied; the chances of some tokens do not exceed 1 together.
    """
    both = sorted(plain.keys() & cold.keys(), key=lambda token: plain[token])
    if len(both) < 2:
        raise ValueError("too few log-probabilities came")
    low, high = both[0], both[-1]
    if max(sum(math.exp(min(value, 1.0)) for value in found.values()) for found in (plain, cold)) > 1.01:
        return "logits"
    before, after = plain[high] - plain[low], cold[high] - cold[low]
    return "processed" if after * temperature >= before * (1 - (1 - temperature) / 2) else "raw"
