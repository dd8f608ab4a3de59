# The two commands of a newcomer. Both set themselves up from a bare checkout; a second run reuses what is there.
VENV := .venv
READY := $(VENV)/.ready
# Set-up leaves bytecode to the first import, which must be able to write it.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all check lint-cpp bench clean

demo: $(READY)
	@scripts/setup.sh install-minilm $(VENV)
	@$(VENV)/bin/lookupffn demo

test: check
	@build/kernels/kernel_tests
	@build/kernels/encoder_tests
	@build/kernels/probe_tests
	@$(VENV)/bin/python -m pytest -n 2 --dist worksteal

# The long run: slow tests too, ten thousand random layers, and the kernels under sanitizers and on emulated processors.
test-all: check
	@LOOKUPFFN_TEST_EXAMPLES=10000 $(VENV)/bin/python -m pytest -m "slow or not slow" --timeout=3600
	@scripts/test_native.sh
	@build/native-release/kernel_tests --long
	@build/native-release/encoder_tests --long

# What needs no test to be seen: style, imports that run one way, types.
check:
	@scripts/setup.sh check-compiler
	@$(MAKE) --no-print-directory $(READY)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/lint-imports --no-logo
	@$(VENV)/bin/mypy
	@$(MAKE) --no-print-directory lint-cpp

lint-cpp: $(READY)
	@find csrc tests benchmarks -name '*.cpp' -o -name '*.h' | xargs $(VENV)/bin/clang-format --dry-run --Werror

# Packed lookup layers beside every dense engine; the engines' packages are installed first.
bench: $(READY)
	@scripts/setup.sh install-bench $(VENV)
	@$(VENV)/bin/lookupffn bench

$(READY): pyproject.toml scripts/setup.sh CMakeLists.txt $(shell find csrc tests/kernels -type f)
	@scripts/setup.sh install $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
