import nanococonut  # noqa: F401  # sets OMP_WAIT_POLICY, which torch reads when imported
