import nanococonut  # noqa: F401  # sets how OpenMP waits, which torch reads when imported
