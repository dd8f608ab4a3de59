# The two commands of a newcomer. Both set themselves up from a bare checkout; a second run reuses what is there.
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo test test-all bench clean

demo: $(READY)
	@$(VENV)/bin/lookupffn demo

test:
	@scripts/setup.sh check-compiler
	@$(MAKE) --no-print-directory $(READY)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/python -m pytest

# The long run: ten thousand random layers, and the kernels under sanitizers and on emulated processors.
test-all: test
	@LOOKUPFFN_TEST_EXAMPLES=10000 $(VENV)/bin/python -m pytest --timeout=3600 tests/test_packed.py tests/test_native.py \
		tests/test_native_calls.py tests/test_native_training.py
	@scripts/test_native.sh
	@build/native-release/kernel_tests --long

# Prepared lookup layers beside every dense engine; the rivals' packages are installed first.
bench: $(READY)
	@scripts/setup.sh install-rivals $(VENV)
	@$(VENV)/bin/lookupffn bench

$(READY): pyproject.toml scripts/setup.sh CMakeLists.txt $(wildcard csrc/*)
	@scripts/setup.sh install $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache
