"""Measuring a model in any runtime: latency, throughput and memory, and a plot of them."""
