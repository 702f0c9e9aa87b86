"""One experiment per system: does its paper's central claim show on data at hand?"""
