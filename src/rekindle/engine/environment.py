"""What an engine's process needs in its environment before any library of it is loaded."""

ENVIRONMENT = {"GOMP_SPINCOUNT": "1000", "OPENBLAS_NUM_THREADS": "1"}
"""`GOMP_SPINCOUNT` is how long threads of an engine that wait for each other spin before they sleep. The default,
milliseconds, multiplies the time of a step as soon as the gateway or anything else wants a core; none at all costs a
wake-up per operation. OpenBLAS, of which only numpy makes use and we none, would start threads when it is loaded, and
a template must have none."""
