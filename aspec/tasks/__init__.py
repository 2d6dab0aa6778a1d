"""What is done when: the words of the dataflow, the policy that emits tasks, the executor that runs them."""
