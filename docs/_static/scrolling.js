/* What is wider than its box scrolls inside it: the keyboard must reach it too. */
const markScrolling = () =>
  document.querySelectorAll("pre, .table-wrapper, .math-wrapper, .sidebar-scroll, .toc-scroll").forEach((box) => {
    const scrolls = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight;
    if (scrolls) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  });
window.addEventListener("load", () => {
  markScrolling();
  window.MathJax?.startup?.promise?.then(markScrolling);
});
window.addEventListener("resize", markScrolling);
