"""Which class verifies which domain: the settings' `verifier` names it.

A new verifier is a settings class in config/rewards.py, a file in verifiers/, and a line here.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from megatron_glmv.config.base import one_line
from megatron_glmv.config.rewards import DomainConfig, RewardsConfig
from megatron_glmv.rl.rewards.verifiers.base import BadReference, Verifier
from megatron_glmv.rl.rewards.verifiers.chart import ChartVerifier
from megatron_glmv.rl.rewards.verifiers.chemistry import ChemistryVerifier
from megatron_glmv.rl.rewards.verifiers.counting import CountingVerifier
from megatron_glmv.rl.rewards.verifiers.general import GeneralVerifier
from megatron_glmv.rl.rewards.verifiers.geo import GeoVerifier
from megatron_glmv.rl.rewards.verifiers.grounding import GroundingVerifier
from megatron_glmv.rl.rewards.verifiers.gui import GuiVerifier
from megatron_glmv.rl.rewards.verifiers.long_document import LongDocumentVerifier
from megatron_glmv.rl.rewards.verifiers.math import MathVerifier
from megatron_glmv.rl.rewards.verifiers.multi_image import MultiImageVerifier
from megatron_glmv.rl.rewards.verifiers.ocr import OcrVerifier
from megatron_glmv.rl.rewards.verifiers.physics import PhysicsVerifier
from megatron_glmv.rl.rewards.verifiers.spatial import SpatialVerifier
from megatron_glmv.rl.rewards.verifiers.video import VideoVerifier
from megatron_glmv.rl.rewards.verifiers.vqa import VqaVerifier
from megatron_glmv.rl.types import Task

REGISTRY: dict[str, type[Verifier[Any]]] = {
    "math": MathVerifier,
    "physics": PhysicsVerifier,
    "chemistry": ChemistryVerifier,
    "chart": ChartVerifier,
    "counting": CountingVerifier,
    "ocr": OcrVerifier,
    "grounding": GroundingVerifier,
    "gui": GuiVerifier,
    "vqa": VqaVerifier,
    "multi_image": MultiImageVerifier,
    "spatial": SpatialVerifier,
    "video": VideoVerifier,
    "long_document": LongDocumentVerifier,
    "geo": GeoVerifier,
    "general": GeneralVerifier,
}
"""The name of a verifier -> its class."""


def settings_of(task: Task, config: RewardsConfig) -> DomainConfig:
    """The settings of a task's domain, with the task's own options over them.

    Raises:
        BadReference: no such domain, or options that its verifier does not have.
    """
    settings = config.domains.get(task.domain)
    if settings is None:
        raise BadReference(f"no domain {task.domain!r}; rewards.domains has {', '.join(config.domains)}")
    if not task.options:
        return settings
    if {"verifier", "prompt"} & set(task.options):
        raise BadReference("options: a sample cannot choose the verifier or the judge's prompt")
    try:
        return type(settings).model_validate({**settings.model_dump(), **task.options})
    except ValidationError as error:
        raise BadReference(one_line(error, "options")) from None


def verifier_of(settings: DomainConfig) -> Verifier[Any]:
    """The verifier that the settings are for."""
    return REGISTRY[getattr(settings, "verifier")](settings)  # noqa: B009 - every settings class of a domain has the field
