// What scrolls sideways can be reached with the keyboard.
const scrolling = "pre, .table-wrapper, .cell_output .output, .cell_output > *, .formula";

function letKeyboardScroll() {
  for (const box of document.querySelectorAll(scrolling)) {
    if (box.scrollWidth > box.clientWidth + 1) {
      box.tabIndex = 0;
    } else {
      box.removeAttribute("tabindex");
    }
  }
}

// The two columns beside the text have names.
function nameColumns() {
  document.querySelector(".sidebar-drawer")?.setAttribute("aria-label", "All pages");
  document.querySelector(".toc-drawer")?.setAttribute("aria-label", "On this page");
}

addEventListener("load", nameColumns);
addEventListener("load", letKeyboardScroll);
addEventListener("resize", letKeyboardScroll);
