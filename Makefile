# make demo       fine-tune small models, unlearn part of the data and evaluate the result
# make test       run all tests
# make docs       build the pages of docs/ into build/docs
# make oldest     run the fast tests on the oldest supported versions
# make lint       check formatting, lints and types
# make format     fix formatting and lints
# make sanitize   run the native tests under AddressSanitizer and UndefinedBehaviorSanitizer, then `make fuzz`
# make fuzz       run the differential fuzzers of csrc/fuzz
#
# Requires git, Python >= 3.10, make and a C++20 compiler. Everything else is installed into .venv.

PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-out

BIN := $(VENV)/bin
READY := $(VENV)/.ready
NATIVE := $(wildcard csrc/*.cpp csrc/*.hpp csrc/*.inl bindings/*.cpp csrc/fuzz/*.cpp csrc/fuzz/*.hpp)

.PHONY: demo test docs oldest lint format sanitize fuzz clean

demo: $(READY)
	$(BIN)/efface demo --output $(OUT) --overwrite

# One process per core with one thread each takes half the time of one process with all threads.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

docs: $(READY)
	$(BIN)/python docs/links.py
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo build/docs/index.html

# Run the fast tests on the oldest supported versions, with the extension that .venv built.
OLDEST := .venv-oldest
OLDEST_TORCH ?= 2.13.0
OLDEST_TESTS := tests/batching tests/objectives tests/reference tests/native tests/hf/test_options.py tests/hf/test_forwards.py
oldest: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --numprocesses auto --dist worksteal -m "not slow" $(OLDEST_TESTS)

# stubtest has a separate cache, because its settings differ from mypy's: in a shared cache, each run of one would
# invalidate the results of the other.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPY_CACHE_DIR=.mypy_cache/stubs $(BIN)/python -m mypy.stubtest --concise --mypy-config-file pyproject.toml efface_native
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# The sanitizer's run-time library must be loaded first, so it is preloaded into Python. Leak detection is off, because
# the interpreter keeps memory until it exits.
SANITIZED := build/sanitize
# pytest is started by its script: `python -m pytest` would import the ordinary build in the current folder.
sanitize: $(READY)
	EFFACE_SANITIZE=1 $(BIN)/python setup.py --quiet build_ext --force --build-lib $(SANITIZED) --build-temp build/sanitize-objects
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONPATH=$(SANITIZED) EFFACE_EXPECT_NATIVE=$(SANITIZED) PYTHONMALLOC=malloc \
	$(BIN)/pytest tests/native
	$(MAKE) fuzz

# Differential fuzzing with the programs of csrc/fuzz, under the address and undefined-behaviour sanitizers. The row
# pass, which is multithreaded, also runs under the thread sanitizer.
FUZZ_SECONDS ?= 10
PACKING_FUZZ_SECONDS ?= 60
FUZZ := -std=c++20 -O1 -g -Wall -Wextra -Wconversion -Werror -DEFFACE_REPLAY -Icsrc $(wildcard csrc/*.cpp) -pthread -ldl
FUZZERS := build/fuzz-packing build/fuzz-rows build/fuzz-threads
fuzz: $(FUZZERS)
	build/fuzz-packing $(PACKING_FUZZ_SECONDS)
	build/fuzz-rows $(FUZZ_SECONDS)
	build/fuzz-threads $(FUZZ_SECONDS)

build/fuzz-packing: SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
build/fuzz-packing: SOURCE := csrc/fuzz/packing_fuzz.cpp
build/fuzz-rows: SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
build/fuzz-rows: SOURCE := csrc/fuzz/row_pass_fuzz.cpp
build/fuzz-threads: SANITIZERS := -fsanitize=thread
build/fuzz-threads: SOURCE := csrc/fuzz/row_pass_fuzz.cpp
$(FUZZERS): $(NATIVE)
	mkdir -p build
	$${CXX:-c++} $(SANITIZERS) $(SOURCE) $(FUZZ) -o $@

$(READY): pyproject.toml setup.py constraints/cpu.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "efface needs Python 3.10 or newer, got " + sys.version.split()[0] + "; set PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints/cpu.txt --editable '.[dev]'
	touch $@

$(OLDEST)/.ready: $(READY) constraints/oldest.txt
	$(BIN)/python -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(OLDEST_TORCH) \
		--requirement constraints/oldest.txt hypothesis pytest pytest-xdist
	printf '%s\n' $(CURDIR) $(CURDIR)/engine $(CURDIR)/kernels > "$$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/efface.pth"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist engine/*.egg-info *.egg-info .pytest_cache .mypy_cache .ruff_cache
