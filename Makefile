VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test native test-native test-sanitized test-neon test-peers peers bench lint types lines check clean

## The two commands of the README ------------------------------------------------------------------------------------
demo: $(READY)          # a real 135 M model into one recipe of each family
	$(PY) examples/demo.py

test: $(READY)          # the fast suite
	$(PY) -m pytest

## The rest ----------------------------------------------------------------------------------------------------------
# torch first and pinned: an open range would bring gigabytes of CUDA packages to a machine without a GPU
$(READY): pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

check: lint types test

native: $(READY)        # the native core again, after a change in csrc/
	cmake -S . -B build/native -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(abspath $(PY)) > build/native.log
	cmake --build build/native
	cmake --install build/native --prefix $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("platlib"))')

# the native core by itself, every set of kernels against plain loops: as it is, with sanitizers, for another processor
NATIVE_TESTS := cmake -S tests/native -G Ninja -B
build:
	mkdir -p $@

test-native: | build
	$(NATIVE_TESTS) build/test-native > build/test-native.log
	cmake --build build/test-native && build/test-native/native_tests

test-sanitized: | build
	$(NATIVE_TESTS) build/test-sanitized -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS="-O1 -g1 \
	  -fsanitize=address,undefined -fno-sanitize-recover=all" > build/test-sanitized.log
	cmake --build build/test-sanitized && build/test-sanitized/native_tests

test-neon: | build
	@command -v aarch64-linux-gnu-g++ > /dev/null && command -v qemu-aarch64-static > /dev/null || \
	  { echo "test-neon: apt install g++-aarch64-linux-gnu qemu-user-static (a cross compiler, an emulator)"; exit 1; }
	$(NATIVE_TESTS) build/test-neon -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static > build/test-neon.log
	cmake --build build/test-neon && qemu-aarch64-static -cpu max build/test-neon/native_tests portable neon

lint: $(READY)
	$(PY) -m ruff check .

types: $(READY)
	$(PY) -m mypy

lines:                  # lines of code per folder
	@for d in $$(git ls-files '*.py' | xargs -n1 dirname | sort -u); do \
	  printf '%6d  %s\n' $$(git ls-files "$$d/*.py" | grep -E "^$$d/[^/]+$$" | xargs cat | wc -l) $$d; done

peers: .peers/.ready    # llama.cpp, bitsandbytes, gptqmodel and compressed-tensors as test oracles, an environment each

.peers/.ready:
	mkdir -p .peers
	for p in llama bnb gptq compressed; do test -x .peers/$$p/bin/python || python3 -m venv .peers/$$p; done
	.peers/llama/bin/python -m pip install -q llama-cpp-python gguf
	for p in bnb gptq compressed; do .peers/$$p/bin/python -m pip install -q -c constraints.txt torch; done
	.peers/bnb/bin/python -m pip install -q -c constraints.txt transformers accelerate bitsandbytes
	.peers/gptq/bin/python -m pip install -q -c constraints.txt gptqmodel optimum
	.peers/compressed/bin/python -m pip install -q -c constraints.txt transformers accelerate compressed-tensors
	touch $@

test-peers: $(READY) peers
	$(PY) -m pytest -m peer

bench: $(READY) peers   # every figure of docs/results.md
	$(PY) -m pytest -m slow
	for b in $$(grep -l 'parser(__doc__)' benchmarks/*.py); do echo "== $$b"; $(PY) $$b || [ $$? = 2 ] || exit 1; done   # 2: without the GPU it needs

clean:
	rm -rf $(VENV) demo-output build dist .pytest_cache .mypy_cache .ruff_cache
