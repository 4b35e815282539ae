(function () {
  "use strict";
  var root = document.documentElement;

  // Light, dark, or what the system says; kept where the browser lets a page on disk keep something.
  var themes = ["auto", "light", "dark"], button = document.getElementById("theme");
  function show(theme) {
    if (theme === "auto") { root.removeAttribute("data-theme"); } else { root.setAttribute("data-theme", theme); }
    button.textContent = "Theme: " + theme;
    button.setAttribute("data-theme-now", theme);
  }
  var kept = "auto";
  try { kept = localStorage.getItem("mmcli-theme") || "auto"; } catch (error) { kept = "auto"; }
  if (themes.indexOf(kept) < 0) { kept = "auto"; }
  button.hidden = false;
  show(kept);
  button.addEventListener("click", function () {
    var next = themes[(themes.indexOf(button.getAttribute("data-theme-now")) + 1) % themes.length];
    show(next);
    try { localStorage.setItem("mmcli-theme", next); } catch (error) { /* it is not kept */ }
  });

  // Tables: a column's button sorts by it, figures falling first, words rising; again turns the order round.
  function value(row, column) {
    var cell = row.cells[column], sort = cell.getAttribute("data-sort");
    return sort === null ? cell.textContent.trim() : parseFloat(sort);
  }
  function compare(a, b) {
    var numbers = typeof a === "number" && typeof b === "number";
    if (typeof a !== typeof b) { return typeof a === "number" ? -1 : 1; }
    return numbers ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  }
  document.querySelectorAll("table.sortable").forEach(function (table) {
    table.querySelectorAll("thead th button").forEach(function (sorter) {
      sorter.addEventListener("click", function () {
        var head = sorter.closest("th"), column = head.cellIndex, body = table.tBodies[0];
        var was = head.getAttribute("aria-sort");
        var falling = was === null ? head.classList.contains("number") : was === "ascending";
        table.querySelectorAll("thead th").forEach(function (other) { other.removeAttribute("aria-sort"); });
        head.setAttribute("aria-sort", falling ? "descending" : "ascending");
        Array.from(body.rows).map(function (row) { return [value(row, column), row]; }).sort(function (a, b) {
          if (typeof a[0] !== typeof b[0]) { return compare(a[0], b[0]); }  // what is undefined stays last
          return falling ? compare(b[0], a[0]) : compare(a[0], b[0]);
        }).forEach(function (pair) { body.appendChild(pair[1]); });
      });
    });
  });

  // The contents show where the reader is.
  var links = {};
  document.querySelectorAll("#contents a").forEach(function (link) { links[link.hash.slice(1)] = link; });
  if ("IntersectionObserver" in window) {
    var seen = new IntersectionObserver(function (entries) {
      entries.forEach(function (entry) {
        if (!entry.isIntersecting) { return; }
        Object.keys(links).forEach(function (name) { links[name].removeAttribute("aria-current"); });
        if (links[entry.target.id]) { links[entry.target.id].setAttribute("aria-current", "true"); }
      });
    }, { rootMargin: "-10% 0px -80% 0px" });
    document.querySelectorAll("main > section").forEach(function (section) { seen.observe(section); });
  }
})();
