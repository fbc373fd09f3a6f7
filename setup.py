"""Package metadata; the versions this project is tested with are in constraints.txt."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """The version written in megatron_glmv/__init__.py, read without importing the package."""
    text = (ROOT / "megatron_glmv" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('megatron_glmv/__init__.py: no line __version__ = "..."')
    return found.group(1)


setup(
    name="megatron-glmv",
    version=read_version(),
    description="Train the GLM-4.1V family of vision-language models with Megatron's 3D parallelism",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_glmv", "megatron_glmv.*", "data_tools", "data_tools.*"]),
    package_data={
        "megatron_glmv.config": ["presets/*.json"],
        "megatron_glmv.rl.rewards": ["prompts/*.txt"],
        "data_tools": ["page.css", "page.js", "rollout_page.css", "rollout_page.js"],
    },
    install_requires=[
        "torch>=2.9",
        "megatron-core==0.16.1",
        "pydantic>=2.7",
        "PyYAML",
        "numpy",
        "mpmath",
        "pillow",
        "av",
        "psutil",
        "safetensors",
        "transformers>=5.23",
        "tokenizers",
        "sentencepiece",
        "tensorboard",
        "tqdm",
        "httpx",
        "matplotlib",
        "scikit-learn",
        "scipy",
        "pyarrow",
        "pyahocorasick",
        "nvidia-dali-cuda130",
        "nvidia-nvimgcodec-cu13",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch,core_cu13]>=2.9,<2.12"],
        "dev": ["peft", "pytest", "pytest-xdist", "ruff", "mypy", "import-linter"],
    },
    entry_points={"console_scripts": ["glmv = megatron_glmv.cli:main", "glmv-data = data_tools.cli:main"]},
)
