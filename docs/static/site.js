// What scrolls sideways can be reached with the keyboard.
const scrolling = "pre, .table-wrapper, .cell_output .output, .cell_output > *, math[display=block]";

function letKeyboardScroll() {
  for (const box of document.querySelectorAll(scrolling)) {
    if (box.scrollWidth > box.clientWidth + 1) {
      box.tabIndex = 0;
    } else {
      box.removeAttribute("tabindex");
    }
  }
}

addEventListener("load", letKeyboardScroll);
addEventListener("resize", letKeyboardScroll);
