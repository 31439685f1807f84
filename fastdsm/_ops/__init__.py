"""Between a public call and who computes: arguments, problems, operators, their gradients, backends."""
