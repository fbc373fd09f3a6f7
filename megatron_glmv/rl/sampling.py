"""How answers are sampled, in the token ids of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_glmv.config.model import ModelShape
from megatron_glmv.config.rl import ForceAnswerConfig, SamplingConfig
from megatron_glmv.data.chat import Chat
from megatron_glmv.rl.engines.engine import Sampling
from megatron_glmv.rl.force_answer import ForceRule


def sampling_in_ids(sampling: SamplingConfig, force: ForceAnswerConfig, shape: ModelShape, chat: Chat) -> Sampling:
    """What engines read of the configuration."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(chat.tokenizer.encode(text, add_special_tokens=False))

    def text(tokens: Sequence[int]) -> str:
        return chat.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    rule: ForceRule | int = sampling.max_tokens
    if force.enabled:
        rule = ForceRule(force.thinking_tokens, force.answer_tokens, ids(force.end_of_think), ids(force.answer_open))
    return Sampling(sampling.temperature, sampling.top_p, tuple(shape.tokens.eos), rule, text)
