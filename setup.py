"""Packaging of nanococonut. The scripts (train.py, sample.py, bench/) run from the checkout."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = (here / "nanococonut/__init__.py").read_text().split('__version__ = "')[1].split('"')[0]

setup(
    name="nanococonut",
    version=version,
    description="Coconut, Chain of Continuous Thought (arXiv 2412.06769), in PyTorch and Triton: "
    "training, inference and benchmarks, in nanoGPT's style",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    # bench/, config/ and tests/ stay in the checkout
    package_dir={"": "."},  # an editable install adds this path (tests/core/test_install.py)
    packages=find_packages(include=["nanococonut*", "kernels"]),
    package_data={
        "nanococonut": ["py.typed", "bundled/*/*", "evaluation/*.html", "weights/*.md"],
        "kernels": ["*.c"],
    },
    install_requires=[  # lower bounds only
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "tiktoken>=0.7",
        "safetensors>=0.4.3",
        "huggingface_hub>=0.24",
        "rich>=13",
        "jinja2>=3.1",
        "datasets>=2.19",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
            "transformers>=4.46",
            "matplotlib>=3.8",
        ],
        "plot": ["matplotlib>=3.8"],
        "tensorboard": ["tensorboard>=2.16"],
    },
)
