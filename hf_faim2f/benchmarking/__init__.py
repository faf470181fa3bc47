"""Latency, throughput and memory of a model in any runtime, and their plot."""
