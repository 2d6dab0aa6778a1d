"""The dataflow: its terms, the policy that emits tasks, and the executor that runs them."""
