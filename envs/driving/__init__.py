"""RouteDriving: batched route driving with traffic, lights and pedestrians, scored as CARLA and nuPlan do.

Everything here is torch, on the CPU or a GPU alike, without a loop over worlds or vehicles. One convention
holds throughout: **the batch is the last dimension** of every internal tensor (`(B,)` for what a world has
once, `(N, B)` for its N actors), so that sums and minima over actors run along memory; vectors are kept as
separate x and y. Lengths are in m, times in s, speeds in m/s, angles in rad (counter-clockwise, heading 0
along x), route completion in percent.
"""
