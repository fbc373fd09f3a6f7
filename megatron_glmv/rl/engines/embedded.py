"""The engine in the trainer's own process: transformers' model, sampled by a batched loop.

Nothing has to be started, and on small models nothing is faster. Every rank may hold one and answer its share of the prompts.

The pictures and the keys and values of a prompt are computed once for all answers to it. The answers to several prompts then
decode together; those that have ended leave the batch when half of it has.

Shapes: B answers that decode together, L tokens of the longest prompt, V vocabulary.

Source: transformers 5.23.0, models/glm4v/modeling_glm4v.py (all three axes of a decoded token's position follow the largest of
the prompt's) and cache_utils.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from megatron_glmv.config.model import ModelShape
from megatron_glmv.convert.hf_config import config_json
from megatron_glmv.rl.engines.engine import EngineError, Request, Sampling
from megatron_glmv.rl.force_answer import Writing
from megatron_glmv.rl.types import Prompt, Rollout
from megatron_glmv.sequence.patches import normalize_patches
from megatron_glmv.sequence.positions import multimodal_positions

_PENDING: Any = None
"""Stands where an answer will be."""


class EmbeddedEngine:
    """transformers' model of the architecture, in this process.

    Args:
        shape: the architecture.
        sampling: temperature, nucleus, stop tokens, budgets and how ids become text.
        max_answers: answers that decode together.
        dtype: of the weights and of the computation.
        device: where it runs.
    """

    weights_on_every_rank = True

    def __init__(
        self,
        shape: ModelShape,
        sampling: Sampling,
        *,
        max_answers: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._shape, self._sampling, self._max_answers, self._dtype = shape, sampling, max_answers, dtype
        self._device = torch.device(device)
        tree = config_json(shape, str(dtype).removeprefix("torch."))
        config = AutoConfig.for_model(**tree)
        self._model: Any = AutoModelForImageTextToText.from_config(config, dtype=dtype).to(self._device).eval()
        self._model.requires_grad_(False)
        self._version: int | None = None
        self._placeholders = {shape.tokens.image, shape.tokens.video}

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take new weights.

        Raises:
            EngineError: a tensor is unknown, of another shape, or missing.
        """
        self._version = None
        own = dict(self._model.named_parameters())
        for name, tensor in tensors:
            if name not in own or own[name].shape != tensor.shape:
                raise EngineError(f"the embedded engine has no tensor {name} of {list(tensor.shape)}")
            own.pop(name).data.copy_(tensor)
        if own:
            raise EngineError(f"new weights lack {next(iter(own))} and {len(own) - 1} more tensors")
        self._version = version

    def expect_version(self, version: int) -> None:
        """Raise where the weights of this version have not come."""
        if version != self._version:
            raise EngineError(f"the embedded engine has weights {self._version} and not {version}; update_weights comes first")

    def check_health(self) -> None:
        """Raise where no weights have come yet, or the last ones did not come whole."""
        if self._version is None:
            raise EngineError("the embedded engine has no complete weights; update_weights comes first")

    def close(self) -> None:
        """Nothing is held but memory."""

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Rollout]]]:
        """Answers to each request, in order; they depend on the weights, the request and its seed alone, up to rounding."""
        self.check_health()
        found: list[list[Rollout]] = [[] for _ in requests]
        complete = 0
        for batch in self._batches(requests):
            self._answer(requests, batch, found)
            while complete < len(requests) and len(found[complete]) == requests[complete].num_answers:
                yield complete, found[complete]
                complete += 1

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, int]]]:
        """Which answers decode together: (request, answers of it), at most `max_answers` in all."""
        batch: list[tuple[int, int]] = []
        for number, request in enumerate(requests):
            left = request.num_answers
            while left:
                room = self._max_answers - sum(count for _, count in batch)
                taken = min(room, left)
                batch.append((number, taken))
                left -= taken
                if taken == room:
                    yield batch
                    batch = []
        if batch:
            yield batch

    @torch.inference_mode()
    def _answer(self, requests: Sequence[Request], batch: Sequence[tuple[int, int]], found: list[list[Rollout]]) -> None:
        """Let the answers of one batch decode together."""
        prompts = [requests[number].prompt for number, _ in batch]
        counts = [count for _, count in batch]
        logits, cache, mask, following = self._read(prompts, counts)
        draws = []
        for number, count in batch:
            first = len(found[number])
            draws += [np.random.default_rng([requests[number].seed, answer]) for answer in range(first, first + count)]
            found[number] += [_PENDING] * count
        answers = [_Decoding(Writing(self._sampling.rule), draw) for draw in draws]
        alive = list(answers)
        while True:
            tokens = self._write(logits, alive)
            kept = [place for place, answer in enumerate(alive) if answer.writing.budget]
            if not kept:
                break
            if 2 * len(kept) <= len(alive):
                index = torch.tensor(kept, device=self._device)
                cache.batch_select_indices(index)
                alive, tokens, mask, following = [alive[place] for place in kept], tokens[index], mask[index], following[index]
            mask = torch.cat((mask, mask.new_ones(len(alive), 1)), dim=1)
            output = self._model(
                input_ids=tokens[:, None],
                position_ids=following.expand(3, -1)[..., None],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits, following = output.logits[:, -1], following + 1
        complete = iter(answers)
        for number, count in batch:
            written = [next(complete).writing for _ in range(count)]
            found[number][-count:] = [one.rollout(self._sampling.text(one.tokens), self._version or 0) for one in written]

    def _read(self, prompts: Sequence[Prompt], counts: Sequence[int]) -> tuple[Tensor, Any, Tensor, Tensor]:
        """Run the prompts, padded on the left, and repeat each for its answers.

        Returns:
            [B, V] logits of the first token, the cache, [B, L] mask, [B] positions of the first token.
        """
        longest = max(len(prompt.tokens) for prompt in prompts)
        ids = torch.full((len(prompts), longest), self._shape.tokens.pad)
        mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
        positions = torch.zeros(3, len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            start = longest - len(prompt.tokens)
            ids[row, start:] = torch.from_numpy(prompt.tokens)
            mask[row, start:] = 1
            visual = prompt.tokens == self._shape.tokens.image
            merge = self._shape.vision.spatial_merge_size
            positions[:, row, start:] = torch.from_numpy(multimodal_positions(visual, prompt.frames, merge))
        ids, mask, positions = ids.to(self._device), mask.to(self._device), positions.to(self._device)
        embeddings = self._model.get_input_embeddings()(ids)
        features = self._features(prompts)
        if features is not None:
            embeddings = embeddings.masked_scatter((ids == self._shape.tokens.image)[..., None], features)
        output = self._model(
            inputs_embeds=embeddings, position_ids=positions, attention_mask=mask, use_cache=True, logits_to_keep=1
        )
        repeats = torch.tensor(counts, device=self._device)
        index = torch.repeat_interleave(torch.arange(len(prompts), device=self._device), repeats)
        cache = output.past_key_values
        cache.batch_select_indices(index)
        following = positions.amax(dim=(0, 2)) + 1
        return output.logits[:, -1][index], cache, mask[index], following[index]

    def _features(self, prompts: Sequence[Prompt]) -> Tensor | None:
        """[V, hidden] merged features of all prompts' frames, in token order; None without pictures."""
        frames = [(1, rows, columns) for prompt in prompts for rows, columns in prompt.frames]
        if not frames:
            return None
        patches = []
        for prompt in prompts:
            if prompt.frames:
                if prompt.patches is None:
                    raise EngineError(f"{prompt.task.key}: has frames and no patches")
                patches.append(_normalized(prompt.patches.to(self._device), self._dtype))
        grid = torch.tensor(frames, device=self._device)
        return self._model.model.visual(torch.cat(patches), grid_thw=grid).pooler_output.to(self._dtype)

    def _write(self, logits: Tensor, alive: Sequence[_Decoding]) -> Tensor:
        """Add one token to every answer whose tokens have all been read; [len(alive)] int64, what the model reads next."""
        logprobs = torch.log_softmax(logits.float() / self._sampling.temperature, dim=-1)
        chances = _nucleus(logprobs, self._sampling.top_p).cumsum(-1)
        sampled = pick_tokens(chances, [answer.draw() for answer in alive])
        chosen = logprobs.gather(1, sampled)[:, 0].tolist()
        for answer, token, logprob in zip(alive, sampled[:, 0].tolist(), chosen, strict=True):
            if token in self._placeholders:
                answer.give_up()
            else:
                answer.take(token, logprob, stopped=token in self._sampling.stop_tokens)
        return torch.tensor([answer.next_token(self._shape.tokens.pad) for answer in alive], device=self._device)


class _Decoding:
    """An answer that is being decoded: what is written, and how much of it the model has read."""

    def __init__(self, writing: Writing, draws: np.random.Generator) -> None:
        self.writing, self._draws, self._read = writing, draws, 0

    def draw(self) -> float:
        """A number in [0, 1) for the next token; none is used up while inserted tokens are read."""
        return float(self._draws.random()) if self._waits() else 0.0

    def take(self, token: int, logprob: float, *, stopped: bool) -> None:
        """Add a sampled token, unless the model has yet to read tokens that were inserted, or the answer is complete."""
        if self._waits():
            self.writing.add([token], [logprob], stopped=stopped)

    def give_up(self) -> None:
        """End the answer before a token that stands for pixels: read back, it would be taken for a picture."""
        if self._waits():
            self.writing.end("abort")

    def next_token(self, pad: int) -> int:
        """What the model reads next."""
        if self._read < len(self.writing.tokens):
            self._read += 1
            return self.writing.tokens[self._read - 1]
        return pad

    def _waits(self) -> bool:
        return bool(self.writing.budget) and self._read == len(self.writing.tokens)


def pick_tokens(sums: Tensor, draws: Sequence[float]) -> Tensor:
    """[B, 1] the token that each draw falls on; never one without a chance.

    Args:
        sums: [B, V] float32, chances added up from the first token to each.
        draws: in [0, 1), of 53 bits. The largest become 1 in float32, which lies behind every token.
    """
    picked = torch.tensor(draws, dtype=sums.dtype, device=sums.device).clamp(max=1 - 2**-24)[:, None]
    return torch.searchsorted(sums, picked * sums[:, -1:], right=True).clamp(max=sums.shape[1] - 1)


def _nucleus(logprobs: Tensor, top_p: float) -> Tensor:
    """[B, V] chances: the most likely tokens that together have `top_p`, the others 0; not divided by their sum."""
    chances = logprobs.exp()
    if top_p >= 1:
        return chances
    ordered, order = chances.sort(dim=-1, descending=True)
    kept = ordered.cumsum(-1) - ordered < top_p
    return torch.zeros_like(chances).scatter(1, order, ordered * kept)


def _normalized(patches: Tensor, dtype: torch.dtype) -> Tensor:
    return normalize_patches(patches, dtype) if patches.dtype == torch.uint8 else patches.to(dtype)
