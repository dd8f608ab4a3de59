# The two commands of a newcomer. Both set themselves up from a bare checkout; a second run reuses what is there.
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo test clean

demo: $(READY)
	@$(VENV)/bin/lookupffn demo

test:
	@scripts/setup.sh check-compiler
	@$(MAKE) --no-print-directory $(READY)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/python -m pytest

$(READY): pyproject.toml scripts/setup.sh CMakeLists.txt $(wildcard csrc/*)
	@scripts/setup.sh install $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache
