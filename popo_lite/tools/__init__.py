"""Programs around a training run: memory plan, bench, sweeps, export, benchmarks. The core never imports them."""
