// Draws the page's view.
(async () => {
  const page = document.getElementById("page");
  const view = JSON.parse(document.getElementById("view").textContent);
  document.body.append(tip);
  page.replaceChildren(el("h1", { textContent: view.title }));
  for (const cut of view.cuts) page.append(el("p", {}, el("b", { textContent: cut })));
  for (const note of view.notes) page.append(el("p", { class: "note", textContent: note }));
  await drawView(view, page);
  document.documentElement.dataset.ready = "true";
})();
