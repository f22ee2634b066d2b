# make demo   serve a real checkpoint on two CPU ranks, train a small one and serve that; a few minutes
# make families  train a small model of each family on real text and serve it; about a quarter of an hour
# make test   lint, types, import contracts, tests
# make lint   the first three only
# make fuzz   300 drawn configurations and 300 padded calls against their references (30 in make test); FUZZ_CASES, FUZZ_FIRST to walk on
# make variants   every kernel compiled for each instruction set that this CPU runs, the portable one included: the same bits
# make speculate  10^4 drawn requests with speculation and without: every stream must be the same (72 in make test); SPECULATION_CASES a family
# make walk   docs/multi-node.md on three hosts of this machine (root, sshd, rsync): ray up, train, lose a host, serve; five minutes
# make chaos  100 faults under load on three hosts of this machine (root, unshare, ip); an hour at most; CHAOS_ARGS
# make soak   half an hour of mixed load: memory and handles of every process must stay flat; SOAK_ARGS
# make outside  clients of others, unmodified, each in an environment of its own, against a real server; OUTSIDE="openai curl" for some
# make outside-files   checkpoints as transformers 4 and 5 write them, against both; makes .venv-transformers5 for the second
# make sanitize  the native tests over kernels built with address and undefined-behaviour sanitisers; some minutes
# make proto  regenerate the gRPC code from its .proto files

PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
VENV5  := .venv-transformers5
STAMP5 := $(VENV5)/.installed
PYTEST_ARGS ?=
CHAOS_ARGS ?=
SOAK_ARGS ?=

.PHONY: demo families test lint style contracts types tests fuzz variants speculate walk chaos soak outside outside-files sanitize format proto setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
	@echo 'installed in $(VENV): ". $(BIN)/activate" puts tp-decoders on the PATH of this shell'

demo: $(STAMP)
	$(BIN)/tp-decoders demo

families: $(STAMP)
	$(BIN)/python bench/families.py

test: $(STAMP)
	@status=0; $(MAKE) --no-print-directory -k lint || status=1; $(MAKE) --no-print-directory tests || status=1; exit $$status

lint: style contracts types

style: $(STAMP)
	$(BIN)/ruff check .

contracts: $(STAMP)
	$(BIN)/lint-imports --no-cache

types: $(STAMP)
	$(BIN)/mypy

tests: $(STAMP)
	$(BIN)/python -m $(if $(strip $(PYTEST_ARGS)),pytest $(PYTEST_ARGS),tests.side_by_side)

fuzz: $(STAMP)
	FUZZ_CASES=$${FUZZ_CASES:-300} $(BIN)/python -m pytest -q tests/tp_decoders/fuzz/test_fuzz.py $(PYTEST_ARGS)

speculate: $(STAMP)
	SPECULATION_CASES=$${SPECULATION_CASES:-1667} $(BIN)/python -m pytest -q -s --timeout=3600 tests/cluster/engine/speculate/test_speculation.py $(PYTEST_ARGS)

walk: $(STAMP)
	$(BIN)/python -m tests.multinode.walk

chaos: $(STAMP)
	$(BIN)/python -m tests.chaos --faults 100 --seed 0 $(CHAOS_ARGS)

soak: $(STAMP)
	$(BIN)/python -m tests.chaos.soak --minutes 30 $(SOAK_ARGS)

outside: $(STAMP)
	$(BIN)/python -m tests.outside.run $(OUTSIDE)

outside-files: $(STAMP) $(STAMP5)
	OUTSIDE_FILES=all $(BIN)/python -m pytest tests/outside/files $(PYTEST_ARGS)

$(STAMP5): constraints-transformers5.txt | $(STAMP)
	test -x $(VENV5)/bin/python || $(PYTHON) -m venv $(VENV5)
	$(VENV5)/bin/python -m pip install --quiet -c constraints-transformers5.txt transformers sentencepiece
	$(BIN)/python -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])" > $$(ls -d $(VENV5)/lib/python*/site-packages)/torch-of-the-first.pth
	touch $@

variants: $(STAMP)
	$(BIN)/python -m tests.parallel.native.variants

sanitize: $(STAMP)
	$(BIN)/python -m tests.sanitized build
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(BIN)/python -m tests.sanitized test $(PYTEST_ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(STAMP)
	$(BIN)/python -m cluster.rpc.protoc

clean:
	rm -rf $(VENV) $(VENV5) .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
