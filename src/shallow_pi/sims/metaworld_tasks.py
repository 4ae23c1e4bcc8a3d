"""Names and instructions of Meta-World's tasks, which need no package.

The package has no instructions in words; these are ours.
"""

# Name in the package, without its version → instruction.
PROMPTS = {
    "assembly": "put the ring over the peg",
    "basketball": "put the ball into the basket",
    "bin-picking": "move the block into the other bin",
    "box-close": "put the lid on the box",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "press the button behind the wall from above",
    "button-press": "press the button",
    "button-press-wall": "press the button behind the wall",
    "coffee-button": "press the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the ring off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "hand-insert": "put the gripper into the hole",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-open": "open the faucet",
    "faucet-close": "close the faucet",
    "hammer": "hammer the nail into the wall",
    "handle-press-side": "press the handle down from the side",
    "handle-press": "press the handle down",
    "handle-pull-side": "pull the handle up from the side",
    "handle-pull": "pull the handle up",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "insert the peg into the box from the side",
    "pick-place-wall": "pick up the puck and place it behind the wall",
    "pick-out-of-hole": "pick the puck out of the hole",
    "reach": "reach the red ball",
    "push-back": "push the block back to the goal",
    "push": "push the puck to the green goal",
    "pick-place": "pick up the puck and place it at the blue goal",
    "plate-slide": "slide the plate into the cabinet",
    "plate-slide-side": "slide the plate sideways into the cabinet",
    "plate-slide-back": "slide the plate out of the cabinet",
    "plate-slide-back-side": "slide the plate sideways out of the cabinet",
    "peg-unplug-side": "unplug the peg from the side",
    "soccer": "kick the ball into the goal",
    "stick-push": "push the thermos with the stick",
    "stick-pull": "pull the thermos with the stick",
    "push-wall": "push the puck around the wall to the goal",
    "reach-wall": "reach the ball behind the wall",
    "shelf-place": "place the block on the shelf",
    "sweep-into": "sweep the block into the hole",
    "sweep": "sweep the block off the table",
    "window-open": "open the window",
    "window-close": "close the window",
}
MT10 = (
    *("reach", "push", "pick-place", "door-open", "drawer-open", "drawer-close"),
    *("button-press-topdown", "peg-insert-side", "window-open", "window-close"),
)
# The tasks of MT10 as often as demonstrations show them: of four, what has to be found is two or
# three of an image's 64 pixels wide, and a policy learns them last.
MT10_DEMONSTRATED = (*MT10, *2 * ("reach", "push", "pick-place", "peg-insert-side"))
