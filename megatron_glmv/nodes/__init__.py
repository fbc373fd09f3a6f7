"""What a node does around its ranks: check itself before them, start them, make a page of their logs; all without Megatron."""
