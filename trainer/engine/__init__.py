"""The engine: everything that touches a DeepSpeed engine while it trains."""
