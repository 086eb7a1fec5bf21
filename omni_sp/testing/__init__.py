"""What tests and benchmarks of parallel code need: rank processes, float64 references and tiny models.

The package's own tests and benchmarks use it, and programs that build on Omni-SP may do the same. Nothing else in the
package imports it.
"""
