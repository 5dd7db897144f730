from pathlib import Path

from setuptools import find_packages, setup


extras = {
    "app": ["gradio>=6.31"],
    "coverage": ["coverage>=7.13"],
    "demo": ["scikit-learn>=1.9"],
    "faiss": ["faiss-cpu>=1.12"],
    "mutation": ["mutmut>=3.8"],
    "peft": ["peft>=0.21"],
    "notebooks": ["ipykernel", "matplotlib>=3.10", "nbclient>=0.10"],
    "onnx": ["onnx>=1.23", "onnxruntime>=1.32", "onnxscript>=0.7"],
    "quantization": ["torchao>=0.18"],
    "trackers": ["tensorboard"],
    "visualization": ["matplotlib>=3.10"],
}
extras["test"] = [
    "hypothesis>=6.100",
    "parameterized>=0.9",
    "pytest>=9.0",
    "pytest-xdist>=3.8",
    "requests",
    "ruff>=0.17",
    "selenium>=4.51",
    "setuptools",
    *extras["app"],
    *extras["demo"],
    *extras["peft"],
    *extras["quantization"],
    *extras["faiss"],
    *extras["notebooks"],
    *extras["onnx"],
    *extras["visualization"],
]

setup(
    name="transformers-testa",
    version="0.1.0",
    description="Efficient long-video-and-language models with temporal-spatial token aggregation for Transformers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords="video retrieval video-question-answering token-merging transformers",
    package_dir={"": "src"},
    packages=find_packages("src"),
    python_requires=">=3.10",
    install_requires=[
        "accelerate>=1.15",
        "av>=18.0",
        "datasets>=5.2",
        "evaluate>=0.4.6",
        "filelock>=3.16",
        "numpy>=2.0",
        "pillow>=11.0",
        "pyyaml>=6.0.2",
        "safetensors>=0.8",
        "tokenizers>=0.23",
        "torch>=2.14",
        "torchvision>=0.29",
        "tqdm>=4.67",
        "transformers>=5.24,<6",
    ],
    extras_require=extras,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
