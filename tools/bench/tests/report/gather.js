// Reads what a report's page draws: every figure with the marks of its axes and of its values, as numbers and places in
// the SVG's own units. Evaluated by the tests in the page; the result is what `page.rs` calls `Drawn`.
(() => {
  const up = (element, name) => element.closest(`[data-${name}]`)?.getAttribute(`data-${name}`) ?? null;
  const number = (text) => (text === null ? null : Number(text));
  const place = (element) => {
    if (element.tagName === 'circle') {
      return [element.cx.baseVal.value, element.cy.baseVal.value];
    }
    const matrix = element.transform.baseVal.consolidate().matrix;
    return [matrix.e, matrix.f];
  };
  const ticks = (figure, name) => {
    const axis = figure.querySelector(`[data-axis=${name}]`);
    if (!axis) return null;
    const marks = [...axis.querySelectorAll('[data-tick]')].map((line) => [
      Number(line.getAttribute('data-tick')),
      name === 'x' ? line.x1.baseVal.value : line.y1.baseVal.value,
    ]);
    return { scale: axis.getAttribute('data-scale'), marks };
  };
  const about = (element) => ({
    scenario: up(element, 'scenario'),
    engine: up(element, 'engine'),
    metric: up(element, 'metric'),
    repetition: number(up(element, 'repetition')),
  });
  const value = (element) => ({
    ...about(element),
    value: number(up(element, 'value')),
    place: place(element),
  });
  const figures = [...document.querySelectorAll('[data-figure]')].map((figure) => ({
    ...about(figure),
    kind: figure.getAttribute('data-figure'),
    sweep: figure.getAttribute('data-sweep'),
    factor: number(figure.getAttribute('data-factor')),
    x: ticks(figure, 'x'),
    y: ticks(figure, 'y'),
    values: [...figure.querySelectorAll('.run > .mark, circle.dot')].map(value),
    medians: [...figure.querySelectorAll('text[data-median]')].map((text) => ({
      ...about(text),
      value: Number(text.getAttribute('data-median')),
      text: text.textContent,
    })),
    parts: [...figure.querySelectorAll('[data-part]')].map((part) => ({
      name: part.getAttribute('data-part'),
      value: Number(part.getAttribute('data-value')),
      height: part.querySelector('rect').height.baseVal.value,
    })),
    spans: [...figure.querySelectorAll('.standstill, .round')].map((span) => {
      const rect = span.querySelector('rect');
      const from = Number(span.getAttribute('data-from-ms'));
      const ms = span.getAttribute('data-ms');
      return {
        round: number(span.getAttribute('data-round')),
        from,
        to: ms === null ? Number(span.getAttribute('data-to-ms')) : from + Number(ms),
        left: rect.x.baseVal.value,
        right: rect.x.baseVal.value + rect.width.baseVal.value,
      };
    }),
    columns: [...figure.querySelectorAll(':scope > g[data-metric]:has(> [data-axis])')].map((column) => ({
      metric: column.getAttribute('data-metric'),
      x: ticks(column, 'x'),
      points: [...column.querySelectorAll('[data-ratio]')].map((point) => ({
        ...about(point),
        ratio: Number(point.getAttribute('data-ratio')),
        low: number(point.getAttribute('data-low')),
        high: number(point.getAttribute('data-high')),
        place: place(point.querySelector('.mark')),
      })),
    })),
  }));
  const cells = [...document.querySelectorAll('td[data-median]')].map((cell) => ({
    ...about(cell),
    value: Number(cell.getAttribute('data-median')),
    text: cell.querySelector('b').textContent,
  }));
  const failures = [...document.querySelectorAll('.failures tbody tr')].map((row) => ({
    ...about(row),
    count: Number(row.getAttribute('data-count')),
  }));
  const limits = [...document.querySelectorAll('.limits tbody tr')].map((row) => ({
    title: row.getAttribute('data-limit'),
    scenario: row.getAttribute('data-scenario'),
    value: number(row.getAttribute('data-value')),
    text: [...row.children].map((cell) => cell.innerText),
  }));

  // Labels that lie on each other or are cut off by the figure's edge.
  const clashes = [];
  for (const svg of document.querySelectorAll('figure svg')) {
    const edge = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map((text) => [text, text.getBoundingClientRect()]);
    texts.forEach(([text, box], index) => {
      const where = `${svg.getAttribute('aria-label')}: "${text.textContent}"`;
      if (box.left < edge.left - 1.5 || box.right > edge.right + 1.5 || box.top < edge.top - 1.5 || box.bottom > edge.bottom + 1.5) {
        clashes.push(`${where} is cut off`);
      }
      for (const [other, second] of texts.slice(index + 1)) {
        const wide = Math.min(box.right, second.right) - Math.max(box.left, second.left);
        const high = Math.min(box.bottom, second.bottom) - Math.max(box.top, second.top);
        if (wide > 1 && high > 3.5) clashes.push(`${where} lies on "${other.textContent}"`);
      }
    });
  }
  const looks = [...document.querySelectorAll('figure .run > .mark')].map((mark) => ({
    ...about(mark),
    look: `${getComputedStyle(mark).getPropertyValue('--c')} ${mark.getAttribute('d')}`,
  }));
  return {
    title: document.title,
    results: JSON.parse(document.getElementById('results').textContent),
    figures,
    cells,
    failures,
    limits,
    clashes,
    looks,
    overflow: document.documentElement.scrollWidth - window.innerWidth,
    paper: getComputedStyle(document.body).backgroundColor,
    scripts: [...document.scripts].filter((script) => script.type !== 'application/json').length,
  };
})()
