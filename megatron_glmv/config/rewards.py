"""How answers are rewarded: the gates every answer passes, one settings class for each verifier, the judge, the reward model.

Source: arXiv 2507.01006, section 5.2 (rules of each domain, box tokens, style); the numbers are those of the authors' released
reward package (zai-org/GLM-V, 8fc9756) where a docstring says so. The paper gives none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from megatron_glmv.config.base import Config
from megatron_glmv.config.http import Address, AskingConfig, TokenEnv, is_loopback

Hack = Literal["interval", "hedge", "several", "vague", "copy", "reference", "judge"]
Low = Annotated[float, Field(ge=-1, le=0)]
"""What a punished answer is worth: 0, as a wrong one, or below."""

ANY_HACK: tuple[Hack, ...] = get_args(Hack)


class FormatGate(Config):
    """Think, answer, box: the shape an answer must have before a verifier reads it."""

    think: Literal["required", "opened", "optional"] = "required"
    """Whether the answer begins with <think>...</think>; opened: the prompt ends with <think>, so only the end tag follows."""
    answer: Literal["required", "optional"] = "required"
    """Whether <answer>...</answer> follows; GLM-4.5V has no answer tags."""
    latex_box: bool = False
    """Whether the answer part may contain \\boxed{; the released package forbids it."""
    max_characters: int = Field(default=400_000, ge=1)
    """Longest text that is looked at, thinking included; a longer one gets the gate's reward with reason limit."""
    stop_tokens: tuple[str, ...] = ("<|endoftext|>", "<|user|>", "<|observation|>")
    """Special tokens that may end the text; they are cut off."""
    reward: Low = 0.0


class LanguageGate(Config):
    """Heavy mixing of Chinese and English in one answer. The four numbers are the released package's."""

    enabled: bool = True
    han_characters: int = Field(default=50, ge=1)
    """A Chinese paragraph has at least so many Chinese characters,"""
    han_share: float = Field(default=0.8, gt=0, le=1)
    """and they are more than this share of its visible characters."""
    english_words: int = Field(default=200, ge=1)
    """An English paragraph has at least so many English words,"""
    english_share: float = Field(default=0.7, gt=0, le=1)
    """and they are more than this share of its words."""
    reward: Low = 0.0


class RepetitionGate(Config):
    """Text that repeats itself. None of the numbers is in the paper; a token here is a word, a Chinese character or a mark."""

    enabled: bool = True
    min_tokens: int = Field(default=200, ge=1)
    """Shorter texts pass."""
    ngram: int = Field(default=20, ge=2)
    """Tokens of a block that is looked for again."""
    ngram_share: float = Field(default=0.5, gt=0, le=1)
    """Largest share of blocks that occurred before in the same part."""
    loop_tokens: int = Field(default=160, ge=2)
    """A block repeated back to back over at least so many tokens, anywhere,"""
    loop_repeats: int = Field(default=4, ge=2)
    """and at least so many times, is a loop."""
    reward: Low = 0.0


class Gates(Config):
    """What every answer passes before the verifier of its domain."""

    format: FormatGate = FormatGate()
    language: LanguageGate = LanguageGate()
    repetition: RepetitionGate = RepetitionGate()


class DomainConfig(Config):
    """What every domain can set."""

    box: Literal["one", "optional", "none"] = "one"
    """Spans of <|begin_of_box|>...<|end_of_box|> in the answer part; none: an answer with box tokens gets the lowest reward."""
    hacks: tuple[Hack, ...] = ANY_HACK
    """Detectors that run; one that also fires on the reference is silent."""
    hack_reward: Low = 0.0
    max_answer_characters: int = Field(default=4_000, ge=1)
    """Longest final answer that is looked at; a longer one is wrong, with reason limit."""
    correct_from: float = Field(default=1.0, gt=0, le=1)
    """Continuous rewards from here count as correct, for accuracy and the curriculum."""


class JudgedConfig(DomainConfig):
    """A domain that may ask the judge."""

    judge: bool = True
    """Ask the judge where the rules cannot say right. Without a judge in `rewards.judge`, the rules decide alone."""
    prompt: Path | None = None
    """File with another prompt; it holds {question}, {reference} and {answer}. null: the one in rl/rewards/prompts."""


class NumericConfig(JudgedConfig):
    """What domains of numbers share."""

    tolerance: float = Field(default=1e-6, ge=0)
    """Relative, of numbers; two whole numbers must be equal. The released package's."""
    percent_sign: Literal["optional", "required"] = "optional"
    """optional: where only one side has a percent sign, 50% is both 0.5 and 50."""


class UnitsConfig(NumericConfig):
    """What domains of numbers with units share."""

    tolerance: float = Field(default=1e-5, ge=0)
    """Relative, in base units. The released package's."""
    missing_unit: Literal["judge", "accept"] = "judge"
    """Equal numbers, one without a unit: ask the judge (without one: wrong), or accept."""


class MathConfig(NumericConfig):
    """Numbers and formulas."""

    verifier: Literal["math"] = "math"


class PhysicsConfig(UnitsConfig):
    """Numbers with units, and formulas."""

    verifier: Literal["physics"] = "physics"


class ChemistryConfig(UnitsConfig):
    """Numbers with units, formulas, reactions."""

    verifier: Literal["chemistry"] = "chemistry"


class ChartConfig(NumericConfig):
    """Values read from a chart."""

    verifier: Literal["chart"] = "chart"
    tolerance: float = Field(default=2.5e-2, ge=0)
    """Relative. The released package's."""
    years: tuple[int, int] = (1000, 3000)
    """Two plain whole numbers in this range are years and must be equal. The released package's."""


class CountingConfig(JudgedConfig):
    """Whole numbers, equal or not."""

    verifier: Literal["counting"] = "counting"
    judge: bool = False


class OcrConfig(DomainConfig):
    """1 - edit distance / longer length."""

    verifier: Literal["ocr"] = "ocr"
    hacks: tuple[Hack, ...] = ("reference",)
    max_answer_characters: int = Field(default=20_000, ge=1)
    correct_from: float = Field(default=0.9, gt=0, le=1)
    whitespace: Literal["keep", "collapse"] = "collapse"
    """collapse: any run of white space counts as one space, and none at the ends."""
    case: Literal["keep", "ignore"] = "keep"


class GroundingConfig(DomainConfig):
    """Share of boxes found."""

    verifier: Literal["grounding"] = "grounding"
    hacks: tuple[Hack, ...] = ()
    iou: float = Field(default=0.5, gt=0, le=1)
    """A box is found if its IoU with the reference's box is at least this. Not in the paper."""
    scale: float = Field(default=1000.0, gt=0)
    """Largest coordinate: per-mille of width and height."""
    max_boxes: int = Field(default=100, ge=1)


class GuiConfig(JudgedConfig):
    """One action of an agent, or a place on the screen, or a question about it."""

    verifier: Literal["gui"] = "gui"
    tolerance: float = Field(default=20.0, gt=0)
    """Per-mille: a click so far from the place is worth nothing; in between it falls linearly. The released package's."""
    box_reward: Literal["iou", "center"] = "iou"
    """What an answered box earns on a reference box: their IoU, or whether its centre is inside."""
    scale: float = Field(default=1000.0, gt=0)
    correct_from: float = Field(default=0.5, gt=0, le=1)


class ShortAnswerConfig(JudgedConfig):
    """What domains of short answers share: equal text, equal number, or the judge."""

    tolerance: float = Field(default=1e-6, ge=0)
    """Relative, of numbers."""
    choices: tuple[str, ...] = ()
    """Texts of the options A, B, C, ... where the reference is a letter; usually set by the sample."""


class VqaConfig(ShortAnswerConfig):
    """Short answers about one picture."""

    verifier: Literal["vqa"] = "vqa"


class MultiImageConfig(ShortAnswerConfig):
    """Short answers about several pictures."""

    verifier: Literal["multi_image"] = "multi_image"


class SpatialConfig(ShortAnswerConfig):
    """Short answers about places, sizes and directions."""

    verifier: Literal["spatial"] = "spatial"


class VideoConfig(ShortAnswerConfig):
    """Short answers about a video, or spans of time."""

    verifier: Literal["video"] = "video"
    span_correct_from: float = Field(default=0.5, gt=0, le=1)
    """IoU of spans from which they count as correct."""
    max_spans: int = Field(default=20, ge=1)


class LongDocumentConfig(JudgedConfig):
    """Answers from long documents: equal text, or the judge."""

    verifier: Literal["long_document"] = "long_document"
    hacks: tuple[Hack, ...] = ("copy", "reference", "judge")
    """In sentences, "or" and "one of the" are no hacks."""


class GeoConfig(JudgedConfig):
    """Where a picture was taken: graded by the judge."""

    verifier: Literal["geo"] = "geo"
    max_answer_characters: int = Field(default=50, ge=1)
    """The released package's."""
    correct_from: float = Field(default=0.8, gt=0, le=1)


class GeneralConfig(JudgedConfig):
    """Answers that no rule can check: the reward model scores them, or, without one, the judge."""

    verifier: Literal["general"] = "general"
    box: Literal["one", "optional", "none"] = "none"
    hacks: tuple[Hack, ...] = ("judge",)
    max_answer_characters: int = Field(default=40_000, ge=1)
    correct_from: float = Field(default=0.5, gt=0, le=1)


AnyDomain = Annotated[
    MathConfig
    | PhysicsConfig
    | ChemistryConfig
    | ChartConfig
    | CountingConfig
    | OcrConfig
    | GroundingConfig
    | GuiConfig
    | VqaConfig
    | MultiImageConfig
    | SpatialConfig
    | VideoConfig
    | LongDocumentConfig
    | GeoConfig
    | GeneralConfig,
    Field(discriminator="verifier"),
]
VERIFIERS: dict[str, type[DomainConfig]] = {
    kind.model_fields["verifier"].default: kind for kind in get_args(get_args(AnyDomain)[0])
}
"""A verifier's name -> its settings."""


class HttpConfig(AskingConfig):
    """Rules of the judge's and the reward model's client."""

    cache: Path | None = None
    """Folder where replies are kept by the content of the question; null: none are."""
    down_after: int = Field(default=8, ge=1)
    """An endpoint with so many failed tries in a row, of questions that have used all of theirs, is left alone,"""
    cooldown_s: float = Field(default=10.0, ge=0)
    """for so many seconds. A question to it waits meanwhile as between its tries and fails after the last; where three or more
    endpoints vote, it fails at once and the others decide."""


class EndpointConfig(Config):
    """One server."""

    url: Address = "http://127.0.0.1:8000/v1"
    """Base address; /chat/completions is added for a judge."""
    model: str = "judge"
    token_env: TokenEnv | None = None
    """Environment variable that holds the bearer token. The token itself is never written anywhere."""
    price_in: float = Field(default=0.0, ge=0)
    """Cost of a million tokens sent, in any currency."""
    price_out: float = Field(default=0.0, ge=0)
    """Cost of a million tokens received."""

    @property
    def is_loopback(self) -> bool:
        """Whether the server runs on this machine."""
        return is_loopback(self.url)


class JudgeConfig(HttpConfig):
    """A model that compares answers with references, behind OpenAI-compatible HTTP."""

    endpoints: tuple[EndpointConfig, ...] = Field(default=(EndpointConfig(),), min_length=1)
    samples: int = Field(default=1, ge=1)
    """Votes of each endpoint; the majority of all votes decides, graded votes are averaged."""
    temperature: float = Field(default=0.0, ge=0)
    """Must be above 0 for several votes of one endpoint to differ. The released package: 0.8 for geo, averaged."""
    max_tokens: int = Field(default=1024, ge=1)
    """Longest reply."""


class RewardModelConfig(HttpConfig):
    """A server that scores answers without a reference: POST {question, answer, media} -> {score}."""

    endpoint: EndpointConfig = EndpointConfig(url="http://127.0.0.1:8001/score", model="reward")
    low: float = 0.0
    """Score that becomes reward 0; lower ones too."""
    high: float = 1.0
    """Score that becomes reward 1; higher ones too."""

    @field_validator("high")
    @classmethod
    def _above_low(cls, high: float, info: Any) -> float:
        if high <= info.data.get("low", high - 1):
            raise ValueError("must be above low")
        return high


class RewardsConfig(Config):
    """Everything between an answer's text and its reward."""

    gates: Gates = Gates()
    domains: dict[str, AnyDomain] = Field(default_factory=dict, validate_default=True)
    """Domain -> settings. Every verifier is there under its own name, with its defaults; your own names need `verifier:`."""
    judge: JudgeConfig | None = None
    reward_model: RewardModelConfig | None = None
    workers: int = Field(default=2, ge=1)
    """Processes that run the verifiers."""
    timeout_s: float = Field(default=5.0, gt=0)
    """Longest time of one answer in a verifier; then its process is ended, a new one starts, and the answer is masked."""
    memory_gb: float = Field(default=4.0, gt=0)
    """Address space of a verifier's process, in 2^30 bytes."""
    max_masked_share: float = Field(default=0.25, ge=0, le=1)
    """Above this share of masked answers in one batch the run stops."""

    @field_validator("domains", mode="before")
    @classmethod
    def _with_builtin(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        domains: dict[str, Any] = {kind: {"verifier": kind} for kind in VERIFIERS}
        for name, settings in given.items():
            named = isinstance(settings, Mapping) and "verifier" not in settings and name in VERIFIERS
            if isinstance(settings, Mapping) and not named and settings.get("verifier") not in VERIFIERS:
                raise ValueError(f"{name}: needs `verifier:`, one of {', '.join(VERIFIERS)}")
            domains[name] = {"verifier": name, **settings} if named else settings
        return domains
