# Short names for what README and CONTRIBUTING describe. Each sets up its environment first.
.PHONY: demo test slow lint types bench

demo:
	bash pipeline_demo.sh

test:
	bash run_tests.sh

slow:
	bash run_tests.sh -m slow -n 0

lint:
	bash .ci/lint

types:
	bash -c 'source ./setup.sh test && mypy'

bench:
	bash bench/gpu.sh
