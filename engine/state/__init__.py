"""What a machine is made of: its configuration, its frames in published and growing states, their durable form."""
