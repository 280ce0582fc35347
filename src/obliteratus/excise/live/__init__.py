"""Plans applied to a running model by hooks: one plan, or one for each row of a batch.

May import what excise/ may, and excise/ itself except bake/.
"""
