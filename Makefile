# Short names for what README describes. Each sets up its environment first.
.PHONY: demo test slow lint bench

demo:
	bash pipeline_demo.sh

test:
	bash run_tests.sh

slow:
	bash run_tests.sh -m slow -n 0

lint:
	ruff check .
	ruff format --check .

bench:
	bash bench/gpu.sh
