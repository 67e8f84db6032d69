"""The topology 'fused', which compiles rollouts and updates into one program (Anakin)."""
